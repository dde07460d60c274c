"""The engine's promises to each request, whatever happens to the others.

The model is a stand-in that does what a test tells it to; the loop, threads and events are real.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from deployments.engine import Engine
from deployments.live_request import Ticket
from deployments.payloads import DenoiseJob, Latents, PromptEmbedding, Stamp, StepProgress
from deployments.sd3.noise import initial_latents, request_generator
from deployments.sd3.precision import choose_precision
from serve.errors import JobCancelled, Overloaded, StageFailed, StageUnavailable

WAIT_S = 20
NOBODY = Stamp(replica="", pid=0, precision="", queue_s=0.0, seconds=0.0)
Event = StepProgress | Latents | BaseException


class ToyModel:
    """Velocity = latents + mean of the prompt; `before` runs first, for tests to interfere."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.precision = choose_precision("fp32", "cpu")
        self.in_channels = 4
        self.calls: list[tuple[int, float]] = []  # rows and noise level of each forward
        self.before: Callable[[torch.Tensor], None] = lambda prompt_embeds: None

    def velocity(
        self,
        latents: torch.Tensor,
        sigmas: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled: torch.Tensor,
    ) -> torch.Tensor:
        self.calls.append((len(latents), float(sigmas[0])))
        self.before(prompt_embeds)
        return latents + prompt_embeds.mean((1, 2))[:, None, None, None]


class Listener:
    """Collects what a request is told."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()

    def __call__(self, event: Event) -> None:
        self.events.put(event)

    def rest(self) -> list[Event]:
        """Everything up to and with the last event."""
        got: list[Event] = []
        while not got or isinstance(got[-1], StepProgress):
            got.append(self.events.get(timeout=WAIT_S))
        return got


def prompt(value: float) -> PromptEmbedding:
    return PromptEmbedding(np.full((3, 8), value, np.float32), np.zeros(5, np.float32), (), NOBODY)


def job(steps: int = 4, value: float = 1.0, **changes: object) -> DenoiseJob:
    made = DenoiseJob(
        job_id="job",
        image=0,
        width=64,
        height=32,
        num_inference_steps=steps,
        guidance_scale=3.0,
        sampler="euler",
        scheduler="normal",
        shift=3.0,
        seed=5,
        positive=prompt(value),
        negative=None,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def model() -> ToyModel:
    return ToyModel()


@pytest.fixture
def engine(model: ToyModel) -> Iterator[Engine]:
    made = Engine(model, max_waiting=4)
    yield made
    made.close()


WRONG_DTYPE = replace(prompt(0), prompt_embeds=np.ones((3, 8), np.int32))  # type: ignore[arg-type]


class Gate:
    """Holds the model at its next forward until opened."""

    def __init__(self, model: ToyModel) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        model.before = self

    def __call__(self, prompt_embeds: torch.Tensor) -> None:
        self.reached.set()
        assert self.opened.wait(WAIT_S)

    def wait(self) -> None:
        assert self.reached.wait(WAIT_S)


def submit(engine: Engine, what: DenoiseJob) -> tuple[Listener, Ticket]:
    listener = Listener()
    return listener, engine.submit(what, listener)


def finished(listener: Listener) -> Latents:
    last = listener.rest()[-1]
    assert isinstance(last, Latents), last
    return last


def failure(listener: Listener) -> BaseException:
    last = listener.rest()[-1]
    assert isinstance(last, BaseException), last
    return last


def test_every_step_is_told_in_order_and_the_latents_come_last(engine):
    events = submit(engine, job(steps=5))[0].rest()
    assert [event.step for event in events if isinstance(event, StepProgress)] == [1, 2, 3, 4, 5]
    assert {event.steps for event in events if isinstance(event, StepProgress)} == {5}
    last = events[-1]
    assert isinstance(last, Latents)
    assert last.latents.shape == (4, 4, 8)
    assert last.latents.dtype == np.float32
    assert last.stamp.precision == "fp32"


def test_one_euler_step_is_what_it_says(engine):
    noise = initial_latents(request_generator(5), 4, 4, 8)
    # One step goes from level 1 to 0: latents - velocity, and velocity is latents + 1.
    latents = finished(submit(engine, job(steps=1))[0]).latents
    np.testing.assert_allclose(latents, noise - (noise + 1), atol=1e-6)


def test_guidance_takes_two_rows_and_goes_from_negative_towards_positive(engine, model):
    guided = job(steps=1, value=1.0, negative=prompt(0.25), guidance_scale=3.0)
    latents = finished(submit(engine, guided)[0]).latents
    # velocity = latents + (.25 + 3 * (1 - .25))
    np.testing.assert_allclose(latents, -2.5, atol=1e-5)
    assert [rows for rows, _ in model.calls] == [2]


def test_without_guidance_one_row_is_taken(engine, model):
    submit(engine, job(steps=3))[0].rest()
    assert [rows for rows, _ in model.calls] == [1, 1, 1]


def test_requests_finish_in_the_order_they_came(engine, model):
    gate = Gate(model)
    order: list[int] = []

    def last_of(number: int) -> Callable[[Event], None]:
        return lambda event: None if isinstance(event, StepProgress) else order.append(number)

    for number in range(3):
        engine.submit(job(), last_of(number))
    listener, _ = submit(engine, job())
    gate.opened.set()
    finished(listener)
    assert order == [0, 1, 2]


def test_queue_length_counts_the_running_and_the_waiting(engine, model):
    gate = Gate(model)
    listeners = [submit(engine, job())[0]]
    gate.wait()
    listeners += [submit(engine, job())[0] for _ in range(2)]
    assert engine.queue_length == 3
    gate.opened.set()
    for listener in listeners:
        finished(listener)
    assert engine.queue_length == 0


def test_too_many_waiting_are_refused(engine, model):
    gate = Gate(model)
    listeners = [submit(engine, job())[0]]
    gate.wait()
    listeners += [submit(engine, job())[0] for _ in range(4)]
    with pytest.raises(Overloaded):
        submit(engine, job())
    gate.opened.set()
    for listener in listeners:
        finished(listener)


def test_a_running_request_stops_at_the_next_step(engine, model):
    gate = Gate(model)
    listener, ticket = submit(engine, job(steps=50))
    gate.wait()
    ticket.cancel()
    gate.opened.set()
    events = listener.rest()
    assert isinstance(events[-1], JobCancelled)
    assert len(model.calls) == 1
    assert engine.queue_length == 0


def test_a_waiting_request_is_cancelled_without_being_run(engine, model):
    gate = Gate(model)
    running, _ = submit(engine, job())
    gate.wait()
    waiting, ticket = submit(engine, job())
    ticket.cancel()
    gate.opened.set()
    events = waiting.rest()
    assert len(events) == 1
    assert isinstance(events[0], JobCancelled)
    finished(running)
    assert len(model.calls) == 4


def test_cancelling_what_is_done_does_nothing(engine):
    listener, ticket = submit(engine, job())
    finished(listener)
    ticket.cancel()
    finished(submit(engine, job())[0])
    assert listener.events.empty()


def poison(prompt_embeds: torch.Tensor) -> None:
    if bool((prompt_embeds == 13).any()):
        raise ValueError("unlucky")


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (job(value=float("nan")), StageFailed),
        (job(value=13.0), StageFailed),
        (job(negative=replace(prompt(0), prompt_embeds=np.ones((9, 9), np.float32))), StageFailed),
        (job(positive=WRONG_DTYPE), StageFailed),
    ],
    ids=["nan", "exception", "shapes differ", "wrong dtype"],
)
def test_a_bad_request_fails_alone(engine, model, bad, expected):
    model.before = poison
    alone = finished(submit(engine, job())[0]).latents
    listeners = [submit(engine, each)[0] for each in (job(), bad, job())]
    assert np.array_equal(finished(listeners[0]).latents, alone)
    assert type(failure(listeners[1])) is expected
    assert np.array_equal(finished(listeners[2]).latents, alone)
    assert engine.is_alive


def test_nan_names_the_step(engine, model):
    def nan_at_third(prompt_embeds: torch.Tensor) -> None:
        if len(model.calls) == 3:
            prompt_embeds.fill_(float("nan"))

    model.before = nan_at_third
    events = submit(engine, job(steps=6))[0].rest()
    assert len(events) == 3
    assert "step 3 of 6" in str(events[-1])


def test_a_listener_that_raises_harms_only_itself(engine):
    def broken(event: Event) -> None:
        raise RuntimeError("the loop is closed")

    engine.submit(job(steps=50), broken)
    finished(submit(engine, job())[0])
    assert engine.queue_length == 0


def test_close_ends_everything_with_a_typed_error(model):
    engine = Engine(model, max_waiting=4)
    gate = Gate(model)
    running, _ = submit(engine, job(steps=50))
    gate.wait()
    waiting, _ = submit(engine, job())
    model.before = lambda prompt_embeds: engine.close()
    gate.opened.set()
    assert type(failure(running)) is StageUnavailable
    assert type(failure(waiting)) is StageUnavailable
    with pytest.raises(StageUnavailable):
        engine.submit(job(), Listener())
    engine.close()
    assert len(model.calls) == 2


def test_the_same_job_twice_gives_the_same_bytes(engine):
    for sampler in ("euler", "dpmpp_2m", "dpmpp_2m_sde"):
        each = [finished(submit(engine, job(sampler=sampler))[0]).latents for _ in range(2)]
        assert np.array_equal(each[0], each[1])


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    ],
    ids=["accelerator", "library"],
)
def test_a_card_that_is_lost_closes_the_engine(engine, model, error):
    gate = Gate(model)
    running, waiting = submit(engine, job())[0], submit(engine, job())[0]
    gate.wait()

    def fail(prompt_embeds: torch.Tensor) -> None:
        raise error

    model.before = fail
    gate.opened.set()
    assert isinstance(failure(running), StageFailed)
    # At once, so that nothing is taken that could only fail.
    assert not engine.is_alive
    assert isinstance(failure(waiting), StageUnavailable)
    with pytest.raises(StageUnavailable):
        engine.submit(job(), Listener())


def test_running_out_of_memory_does_not_close_the_engine(engine, model):
    def fail(prompt_embeds: torch.Tensor) -> None:
        model.before = lambda prompt_embeds: None
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    model.before = fail
    assert isinstance(failure(submit(engine, job())[0]), StageFailed)
    finished(submit(engine, job())[0])
    assert engine.is_alive
