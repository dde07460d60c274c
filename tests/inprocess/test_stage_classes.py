"""The stage classes without Ray Serve: batching, caching, grouping of progress, cancelling."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from deployments import denoiser as denoiser_module
from deployments.denoiser import Denoiser
from deployments.engine import Engine
from deployments.engine_load import EngineLoad
from deployments.payloads import (
    Checkpoint,
    DenoiseJob,
    Handover,
    Latents,
    PromptEmbedding,
    Stamp,
    StepProgress,
    TextJob,
)
from deployments.sd3.text import EncodedPrompt
from deployments.text_encoder import TextEncoder
from deployments.turns import Turns
from deployments.vae_decoder import VaeDecoder
from serve.config import ModelSettings, PoolSettings
from serve.errors import InvalidRequest, StageUnavailable

MODEL = ModelSettings(path="pico")


def pool(name: str) -> PoolSettings:
    return PoolSettings(name=name, torch_threads=1)


def text(prompt: str) -> TextJob:
    return TextJob(prompt, prompt, prompt, 16)


class FakeEncoders:
    """Counts calls, can be held up, and fails on prompts that say so."""

    def __init__(self, real: Any) -> None:
        self.precision = real.precision
        self.resident_bytes = real.resident_bytes
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()

    def encode(self, jobs: Sequence[TextJob]) -> list[EncodedPrompt]:
        self.gate.wait(30)
        self.batches.append([job.prompt for job in jobs])
        if any(job.prompt == "bad" for job in jobs):
            raise InvalidRequest("bad prompt")
        array = np.zeros((2, 2), np.float32)
        return [EncodedPrompt(array, array[0], (job.prompt,)) for job in jobs]


@pytest.fixture(scope="module")
def real_encoder() -> TextEncoder:
    return TextEncoder(MODEL, pool("text-encoder"))


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> tuple[TextEncoder, FakeEncoders]:
    encoder = TextEncoder(MODEL, pool("text-encoder"))
    fake = FakeEncoders(encoder._encoders)
    encoder._encoders = fake  # type: ignore[assignment]
    return encoder, fake


async def test_equal_prompts_are_encoded_once(encoder: tuple[TextEncoder, FakeEncoders]):
    stage, fake = encoder
    fake.gate.clear()
    together = asyncio.gather(*(stage.encode((text("a"), text("b"))) for _ in range(5)))
    await asyncio.sleep(0)
    fake.gate.set()
    answers = await together
    assert [[one.warnings for one in answer] for answer in answers] == [[("a",), ("b",)]] * 5
    assert fake.batches == [["a"], ["b"]]
    (cached,) = await stage.encode((text("a"),))
    assert cached.stamp.seconds == 0
    assert fake.batches == [["a"], ["b"]]
    assert stage.status()["cache_hits"] == 1


async def test_what_waits_is_batched_and_one_bad_prompt_spoils_nothing(
    encoder: tuple[TextEncoder, FakeEncoders],
):
    stage, fake = encoder
    stage._largest_batch = 3
    fake.gate.clear()
    prompts = ["first", "x", "bad", "y", "z"]
    together = asyncio.gather(
        *(stage.encode((text(prompt),)) for prompt in prompts), return_exceptions=True
    )
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    fake.gate.set()
    answers = await together
    assert isinstance(answers[2], InvalidRequest)
    for prompt, answer in zip(prompts, answers, strict=True):
        if prompt != "bad":
            assert not isinstance(answer, BaseException)
            assert answer[0].warnings == (prompt,)
    assert max(len(batch) for batch in fake.batches) == 3
    # The failure is not remembered.
    with pytest.raises(InvalidRequest):
        await stage.encode((text("bad"),))
    assert stage.status()["queue_length"] == 0


async def test_who_gives_up_leaves_the_answer_to_the_others(
    encoder: tuple[TextEncoder, FakeEncoders],
):
    stage, fake = encoder
    fake.gate.clear()
    leaving = asyncio.create_task(stage.encode((text("a"),)))
    staying = asyncio.create_task(stage.encode((text("a"),)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    leaving.cancel()
    fake.gate.set()
    (answer,) = await staying
    assert answer.warnings == ("a",)


async def test_the_bytes_of_an_embedding_do_not_depend_on_company(real_encoder: TextEncoder):
    crowd = tuple(text(f"a red circle number {number}") for number in range(6))
    alone = TextEncoder(MODEL, pool("text-encoder"))
    (expected,) = await alone.encode((crowd[3],))
    got = (await real_encoder.encode(crowd))[3]
    assert got.prompt_embeds.tobytes() == expected.prompt_embeds.tobytes()
    assert got.pooled_prompt_embeds.tobytes() == expected.pooled_prompt_embeds.tobytes()


@dataclass
class FakeTicket:
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeEngine:
    """Hands its callback to the test."""

    queue_length = 0
    is_alive = True

    def __init__(self) -> None:
        self.ticket = FakeTicket()
        self.tell: Callable[[Any], None] | None = None

    def load(self) -> EngineLoad:
        return EngineLoad(waiting_s=1.5, requests=2)

    def cool_seconds(self, job: DenoiseJob) -> float:
        return 0.25

    def submit(self, job: DenoiseJob, on_event: Callable[[Any], None]) -> FakeTicket:
        self.tell = on_event
        return self.ticket


@pytest.fixture(scope="module")
def loaded_denoiser() -> Denoiser:
    warm = {"warm_sizes": ((64, 64), (128, 64)), "warm_rows": (3,)}
    return Denoiser(MODEL, pool("denoiser").model_copy(update=warm))


@pytest.fixture
def denoiser(loaded_denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> Denoiser:
    monkeypatch.setattr(loaded_denoiser, "_engine", FakeEngine())
    return loaded_denoiser


LATENTS = Latents(np.zeros((16, 2, 2), np.float32), Stamp("", 0, "fp8", 0.0, 1.0))
PROMPT = PromptEmbedding(np.zeros((2, 2), np.float32), np.zeros(2, np.float32), (), LATENTS.stamp)
JOB = DenoiseJob("1", 0, 16, 16, 40, 1.0, "euler", "normal", 3.0, 0, PROMPT, None)


async def test_fast_steps_travel_together_and_none_is_lost(
    denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(denoiser_module, "_BETWEEN_ITEMS_S", 30.0)
    stream = denoiser.denoise(JOB)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    engine: Any = denoiser._engine
    engine.tell(StepProgress(1, 40, 0.1))
    (told,) = await first
    assert isinstance(told, StepProgress)
    assert replace(told, load=None) == StepProgress(1, 40, 0.1)
    assert told.load is not None
    assert (told.load.waiting_s, told.load.requests) == (1.5, 2)
    assert told.load.id == denoiser._identity.replica
    for step in range(2, 41):
        engine.tell(StepProgress(step, 40, 0.1))
    engine.tell(LATENTS)
    rest = [event async for item in stream for event in item]
    assert rest[:-1] == [StepProgress(step, 40, 0.1) for step in range(2, 41)]
    assert isinstance(rest[-1], Latents)
    assert rest[-1].stamp.pid > 0
    assert rest[-1].load is not None, "each item carries the replica's load once"
    assert rest[-1].cool_s is not None
    assert rest[-1].cool_s > 0
    assert "arithmetic" in rest[-1].stamp.precision


async def test_of_checkpoints_that_travel_together_the_newest_goes_and_a_handover_ends_the_stream(
    denoiser: Denoiser,
):
    array = LATENTS.latents
    taken = [
        Checkpoint(1, n, 40, "euler", "normal", 3.0, 0, array, None, np.zeros(1, np.uint8))
        for n in (1, 2, 3)
    ]
    stream = denoiser.denoise(JOB)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    engine: Any = denoiser._engine
    engine.tell(StepProgress(1, 40, 0.1))
    await first
    for checkpoint in taken:
        engine.tell(StepProgress(checkpoint.step + 1, 40, 0.1, checkpoint=checkpoint))
    item = await anext(stream)
    assert [each.checkpoint for each in item if isinstance(each, StepProgress)] == [
        None,
        None,
        taken[2],
    ]
    engine.tell(Handover(taken[2]))
    assert [item async for item in stream] == [(Handover(taken[2]),)]


def test_a_denoiser_that_takes_requests_has_made_a_step_at_every_size_and_number_of_rows(
    loaded_denoiser: Denoiser,
):
    buckets = {
        f"{size} x{rows}" for size in ("64x64", "128x64") for rows in ("1 row", "2 rows", "3 rows")
    }
    assert set(loaded_denoiser.status()["measured_ms"]) == buckets


def test_a_denoiser_whose_engine_has_ended_is_replaced(
    loaded_denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
):
    loaded_denoiser.check_health()
    engine = Engine(loaded_denoiser._mmdit, max_waiting=1)
    engine.close()
    monkeypatch.setattr(loaded_denoiser, "_engine", engine)
    with pytest.raises(StageUnavailable, match="shutting down"):
        loaded_denoiser.check_health()


def test_a_denoiser_says_what_it_does_and_what_forwards_take(loaded_denoiser: Denoiser):
    status = loaded_denoiser.status()
    assert status["engine"]["live_requests"] == 0
    assert status["engine"]["joules"] is None  # no card
    assert all(ms > 0 for ms in status["measured_ms"].values())
    assert set(status["path"].values()) == {"eager"}
    assert status["measured_ms"].keys() == status["path"].keys() == status["attention"].keys()


async def test_an_engines_error_is_raised(denoiser: Denoiser):
    stream = denoiser.denoise(JOB)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    engine: Any = denoiser._engine
    engine.tell(InvalidRequest("no such sampler", field="sampler"))
    with pytest.raises(InvalidRequest, match="sampler"):
        await first


async def test_a_cancelled_stream_cancels_its_ticket(denoiser: Denoiser):
    stream = denoiser.denoise(JOB)
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    engine: Any = denoiser._engine
    assert not engine.ticket.is_cancelled
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert engine.ticket.is_cancelled


async def test_pictures_are_decoded_off_the_event_loop():
    decoder = VaeDecoder(MODEL, pool("vae-decoder"))
    latents = Latents(
        np.random.default_rng(0).normal(size=(16, 4, 6)).astype(np.float32), LATENTS.stamp
    )
    first, second = await asyncio.gather(decoder.decode(latents), decoder.decode(latents))
    assert first.pixels.shape == (32, 48, 3)
    assert first.pixels.dtype == np.uint8
    assert first.pixels.tobytes() == second.pixels.tobytes()
    status = decoder.status()
    assert status["queue_length"] == 0
    assert status["resident_bytes"] > 0


class RecordedTurns(Turns):
    def __init__(self) -> None:
        super().__init__()
        self.alone: list[bool] = []

    def turn(self, *, alone: bool) -> AbstractAsyncContextManager[None]:
        self.alone.append(alone)
        return super().turn(alone=alone)


async def test_every_stage_works_alone_on_a_suspect_and_on_nothing_else(
    real_encoder: TextEncoder, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
):
    decoder = VaeDecoder(MODEL, pool("vae-decoder"))
    pixels = np.zeros((16, 16, 3), np.uint8)
    for stage, call in (
        (real_encoder, lambda alone: real_encoder.encode((text("a"),), alone=alone)),
        (decoder, lambda alone: decoder.decode(LATENTS, alone=alone)),
        (decoder, lambda alone: decoder.encode(pixels, alone=alone)),
    ):
        turns = RecordedTurns()
        monkeypatch.setattr(stage, "_turns", turns)
        for alone in (False, True):
            await call(alone)
        assert turns.alone == [False, True]
    monkeypatch.setattr(denoiser, "_turns", turns := RecordedTurns())
    stream: Any = denoiser.denoise(replace(JOB, alone=True))
    assert await anext(stream) == (), "it is told that it is alone"
    await stream.aclose()
    assert turns.alone == [True]


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Any:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
