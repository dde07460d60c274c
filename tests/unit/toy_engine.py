"""A model that does what a test tells it to, jobs for it, and ears for what the engine says."""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from deployments.engine import Engine
from deployments.payloads import (
    DenoiseEvent,
    DenoiseJob,
    EncodedImage,
    Latents,
    Path,
    PromptEmbedding,
    Stamp,
    StepProgress,
)
from deployments.schedule import TokenShape, Work
from deployments.sd3.lora_layers import PageUse
from deployments.sd3.precision import choose_precision
from deployments.step_costs import StepCosts
from deployments.ticket import Ticket

WAIT_S = 20
NOBODY = Stamp(replica="", pid=0, precision="", queue_s=0.0, seconds=0.0)
Event = DenoiseEvent | BaseException


@dataclass(frozen=True)
class Call:
    """One forward, as the model saw it: the mean of each row's prompt says whose row it is."""

    prompts: tuple[float, ...]
    sigmas: tuple[float, ...]
    latents: tuple[int, ...]  # shape

    @property
    def rows(self) -> int:
        return len(self.prompts)


class ToyModel:
    """Velocity = latents + mean of the prompt; `before` runs first, for tests to interfere."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.precision = choose_precision("fp32", "cpu")
        self.in_channels = 4
        self.calls: list[Call] = []
        self.loras: list[tuple[tuple[PageUse, ...], ...]] = []  # of each call
        self.before: Callable[[torch.Tensor], None] = lambda prompt_embeds: None

    def path(
        self, height: int, width: int, text_tokens: int, rows: int, adapted: bool = False
    ) -> Path:
        return "graph" if rows == 2 else "eager"

    def velocity(
        self,
        latents: torch.Tensor,
        sigmas: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled: torch.Tensor,
        loras: Sequence[Sequence[PageUse]] = (),
    ) -> torch.Tensor:
        means = prompt_embeds.mean((1, 2))
        self.loras.append(tuple(tuple(row) for row in loras))
        self.calls.append(Call(tuple(means.tolist()), tuple(sigmas.tolist()), tuple(latents.shape)))
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


class Gate:
    """Holds the model at every forward from its next on until opened."""

    def __init__(self, model: ToyModel) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        model.before = self

    def __call__(self, prompt_embeds: torch.Tensor) -> None:
        self.reached.set()
        assert self.opened.wait(WAIT_S)

    def wait(self) -> None:
        assert self.reached.wait(WAIT_S)


class Clock:
    """Stands still until told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def one_at_a_time(
    works: Sequence[Work],
    costs: StepCosts,
    now: float,
    row_limit: Callable[[TokenShape], int],
) -> tuple[int, ...]:
    """A policy that carries the oldest to its end."""
    return (min(work.key for work in works),) if works else ()


def everyone(
    works: Sequence[Work],
    costs: StepCosts,
    now: float,
    row_limit: Callable[[TokenShape], int],
) -> tuple[int, ...]:
    """A policy that batches whatever shares the oldest one's shape."""
    if not works:
        return ()
    chosen: list[int] = []
    rows = 0
    first = min(works, key=lambda work: work.key).shape
    for work in sorted(works, key=lambda work: work.key):
        if work.shape == first and (not chosen or rows + work.rows <= row_limit(first)):
            chosen.append(work.key)
            rows += work.rows
    return tuple(chosen)


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


def image(value: float, width: int = 64, height: int = 32) -> EncodedImage:
    """A start image of a job's size, the same everywhere."""
    shape = (4, height // 8, width // 8)
    return EncodedImage(np.full(shape, value, np.float32), np.full(shape, 0.1, np.float32), NOBODY)


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


def alone(what: DenoiseJob) -> np.ndarray:
    """What a job gives in an engine of its own."""
    engine = Engine(ToyModel(), max_waiting=1)
    try:
        return finished(submit(engine, what)[0]).latents
    finally:
        engine.close()
