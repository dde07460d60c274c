"""Requests of all kinds with LoRAs through the engine: what they cost, and that each is its own."""

from __future__ import annotations

import argparse
import queue
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from deployments.engine import Engine
from deployments.lora_shelf import LoraShelf
from deployments.payloads import DenoiseJob, Latents, LoraUse, PromptEmbedding, Stamp, StepProgress
from deployments.sd3.lora_arena import HostPage, pages_of
from deployments.sd3.mmdit import Mmdit
from deployments.sd3.wire import to_wire
from loadtest.denoise_arms import relative_error
from loadtest.random_lora import random_lora
from loadtest.sd35 import Inputs

_WAIT_S = 600
_NOBODY = Stamp(replica="", pid=0, precision="", queue_s=0.0, seconds=0.0)


def run_requests(
    mmdit: Mmdit, inputs: Inputs, rank: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Run requests of all kinds together, with LoRAs, without, and some of them alone.

    Args:
        mmdit: With room for as many LoRAs as there are.
        inputs: Two rows at least, whose texts are those of all requests.
        rank: Of every LoRA.
        options: Of the command line.
    """
    assert mmdit.loras is not None
    source = _InMemory(mmdit, rank)
    jobs = _jobs(inputs, options)
    for job in jobs:  # drawing them is no part of what is measured
        source.read(job.loras[0])

    def run(jobs: Sequence[DenoiseJob]) -> tuple[float, list[Latents], list[StepProgress]]:
        assert mmdit.loras is not None
        engine = Engine(
            mmdit, max_waiting=len(jobs), loras=LoraShelf(mmdit.loras, source), limits=None
        )
        heard: list[queue.Queue[Any]] = [queue.Queue() for _ in jobs]
        began = time.perf_counter()
        try:
            for job, ear in zip(jobs, heard, strict=True):
                engine.submit(job, ear.put)
            ends, steps = [], []
            for ear in heard:
                while isinstance(event := ear.get(timeout=_WAIT_S), StepProgress):
                    steps.append(event)
                if not isinstance(event, Latents):
                    raise event
                ends.append(event)
            return time.perf_counter() - began, ends, steps
        finally:
            engine.close()

    plain = [replace(job, loras=()) for job in jobs]
    run(plain[:4])
    without_s, _, _ = run(plain)
    with_s, together, steps = run(jobs)
    again_s, _, _ = run(plain)
    compared = range(0, len(jobs), max(1, len(jobs) // options.compared))
    errors = []
    for at in compared:
        _, (alone,), _ = run([jobs[at]])
        errors.append(
            relative_error(torch.from_numpy(together[at].latents), torch.from_numpy(alone.latents))
        )
    best_s = min(without_s, again_s)
    return {
        "requests": len(jobs),
        "loras": options.loras,
        "seconds_without": [without_s, again_s],
        "seconds_with": with_s,
        "ratio": with_s / best_s,
        "paths": sorted({step.path for step in steps}),
        "latents_against_alone": errors,
    }


class _InMemory:
    """Files that are none: drawn where a file would be read."""

    def __init__(self, mmdit: Mmdit, rank: int) -> None:
        self.mmdit, self.rank = mmdit, rank
        assert mmdit.loras is not None
        self.arena = mmdit.loras
        self.packed: dict[str, list[HostPage]] = {}

    def pages(self, use: LoraUse) -> int:
        return pages_of(self.rank)

    def read(self, use: LoraUse) -> Sequence[HostPage]:
        if use.name not in self.packed:
            drawn = random_lora(self.mmdit, self.rank, "all", int(use.name))
            self.packed[use.name] = self.arena.pack(drawn)
        return self.packed[use.name]


def _jobs(inputs: Inputs, options: argparse.Namespace) -> list[DenoiseJob]:
    """Return requests that differ in steps, guidance, sampler, weight and LoRA."""
    prompts = [
        PromptEmbedding(
            to_wire(inputs.prompt_embeds[at].bfloat16().cpu()),
            to_wire(inputs.pooled[at].bfloat16().cpu()),
            (),
            _NOBODY,
        )
        for at in range(2)
    ]
    return [
        DenoiseJob(
            job_id=f"{at}",
            image=0,
            width=options.size,
            height=options.size,
            num_inference_steps=options.request_steps + at % 3,
            guidance_scale=1.0 if at % 5 == 4 else 3.0 + at % 4,
            sampler=("euler", "dpmpp_2m")[at % 2],
            scheduler="normal",
            shift=3.0,
            seed=at,
            positive=prompts[0],
            negative=None if at % 5 == 4 else prompts[1],
            loras=(LoraUse(str(at % options.loras), 0.5 + 0.25 * (at % 3)),),
        )
        for at in range(options.requests)
    ]
