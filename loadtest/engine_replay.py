"""One cell of the engine benchmark with real forwards: the same arrivals, the real engine.

Everything that the virtual clock leaves out is in it: threads, samplers, the host's share of a
step, the card's clocks. What it takes is compared with the virtual clock on a curve measured in
the same process, just before, on the same buckets.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deployments.engine import Engine
from deployments.payloads import (
    DenoiseEvent,
    DenoiseJob,
    PromptEmbedding,
    Stamp,
    StepProgress,
)
from deployments.sd3.mmdit import Mmdit
from deployments.step_costs import StepCosts
from loadtest.arrivals import TEXT_TOKENS, Arrival
from loadtest.latencies import Latencies, Served, summary
from loadtest.virtual_clock import serve_steps

WITHIN = 0.15  # of the virtual clock
_LONGEST_WAIT_S = 600.0
_NOBODY = Stamp(replica="", pid=0, precision="", queue_s=0.0, seconds=0.0)


class Replay:
    """Sends arrivals to an engine at their times and notes when each is finished.

    Args:
        mmdit: With every bucket prepared.
        costs: Of its forwards; the engine goes on measuring into it.
    """

    def __init__(self, mmdit: Mmdit, costs: StepCosts) -> None:
        self._prompt = random_prompt(mmdit)
        self._costs = costs
        self._mmdit = mmdit
        self.observed = costs
        """What the last run's engine had measured by its end."""

    def serve(self, arrivals: Sequence[Arrival]) -> Served:
        """Serve them all, in an engine of their own.

        Raises:
            BaseException: What a request ended with if not with latents.
            TimeoutError: Some were not finished long after the last had come.
        """
        finished_at: dict[int, float] = {}
        failed: list[BaseException] = []
        done = threading.Semaphore(0)
        # Its own copy, so that a second run starts from the same knowledge.
        costs = StepCosts.from_json(self._costs.as_json())
        engine = Engine(self._mmdit, max_waiting=len(arrivals), costs=costs)
        began = time.monotonic()

        def listener(key: int) -> Any:
            def on_event(event: DenoiseEvent | BaseException) -> None:
                if isinstance(event, StepProgress):
                    return
                if isinstance(event, BaseException):
                    failed.append(event)
                finished_at[key] = time.monotonic() - began
                done.release()

            return on_event

        try:
            for arrival in arrivals:
                time.sleep(max(0.0, began + arrival.at - time.monotonic()))
                engine.submit(replay_job(arrival, self._prompt), listener(arrival.key))
            for _ in arrivals:
                if not done.acquire(timeout=_LONGEST_WAIT_S):
                    raise TimeoutError("the engine did not finish what it was given")
            forwards = engine.stats().forwards
            self.observed = StepCosts.from_json(engine.measured())
        finally:
            engine.close()
        if failed:
            raise failed[0]
        row_steps = sum(arrival.rows * arrival.steps for arrival in arrivals)
        return Served(arrivals, finished_at, forwards, row_steps)

    def between_forwards_s(self, arrivals: Sequence[Arrival]) -> float:
        """Return what the engine itself adds to a forward: one request alone, less its forwards."""
        first = arrivals[0]
        alone = Arrival(first.key, 0.0, first.shape, first.rows, first.steps)
        took = [self.serve([alone]).finished_at[first.key] for _ in range(2)]
        return max(0.0, (min(took) - alone.unloaded_s(self._costs)) / alone.steps)


def replay_job(arrival: Arrival, prompt: PromptEmbedding) -> DenoiseJob:
    """Return what an arrival asks an engine for."""
    guided = arrival.rows == 2
    return DenoiseJob(
        job_id=f"replay-{arrival.key}",
        image=0,
        width=arrival.shape.width * 8,
        height=arrival.shape.height * 8,
        num_inference_steps=arrival.steps,
        guidance_scale=4.5 if guided else 1.0,
        sampler="euler",
        scheduler="normal",
        shift=3.0,
        seed=arrival.key,
        positive=prompt,
        negative=prompt if guided else None,
    )


def random_prompt(mmdit: Mmdit) -> PromptEmbedding:
    """Return embeddings of the shape that a model takes."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape).astype(np.float32)

    return PromptEmbedding(
        normal(TEXT_TOKENS, mmdit.joint_attention_dim),
        normal(mmdit.pooled_projection_dim),
        (),
        _NOBODY,
    )


def compare(
    replay: Replay, arrivals: Sequence[Arrival], measured: StepCosts, recorded: StepCosts | None
) -> dict[str, Any]:
    """Serve arrivals for real and under the virtual clock.

    Args:
        replay: On the real engine.
        arrivals: For both.
        measured: Costs measured in this process; what the engine starts from as well.
        recorded: Costs from a file, for a second comparison.

    Returns:
        Figures of each, and the ratios of the real ones to the virtual ones.
    """
    between = replay.between_forwards_s(arrivals)
    real = summary([replay.serve(arrivals)], measured)
    virtual = summary([serve_steps(arrivals, measured, between_forwards_s=between)], measured)
    told = summary([serve_steps(arrivals, replay.observed)], replay.observed)
    report = {
        "requests": len(arrivals),
        "between_forwards_ms": round(between * 1000, 3),
        "real": _rounded(real),
        "virtual": _rounded(virtual),
        "real_to_virtual": _ratios(real, virtual),
        # If only this agrees, the card's clocks were others under load than while measuring.
        "real_to_virtual_on_observed": _ratios(real, told),
    }
    if recorded is not None:
        other = summary([serve_steps(arrivals, recorded)], recorded)
        report |= {
            "virtual_on_recorded": _rounded(other),
            "real_to_virtual_on_recorded": _ratios(real, other),
        }
    worst = max(abs(ratio - 1) for ratio in _ratios(real, virtual).values())
    return report | {"furthest": round(worst, 4), "at_most": WITHIN, "met": worst <= WITHIN}


def _ratios(real: Latencies, virtual: Latencies) -> dict[str, float]:
    names = ("p50", "p95", "throughput")
    return {name: round(getattr(real, name) / getattr(virtual, name), 4) for name in names}


def _rounded(figures: Latencies) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(figures).items()}
