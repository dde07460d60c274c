"""What LoRAs cost in a mixed batch, and whether each row is what it would be alone.

    python -m loadtest.lora_bench --json

SD3.5's real shapes with random weights, and random LoRAs that change a velocity visibly. Every row
of a forward has another of eight LoRAs; the same forward without is timed in turns with it. Then
twenty requests with those eight go through the engine together, and again without, and alone.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from rich.table import Table
from torch import Tensor

from deployments.engine import Engine
from deployments.lora_shelf import LoraShelf
from deployments.payloads import DenoiseJob, Latents, LoraUse, PromptEmbedding, Stamp, StepProgress
from deployments.sd3.lora_arena import HostPage, LowRank, pages_of
from deployments.sd3.lora_layers import PageUse
from deployments.sd3.mmdit import Mmdit
from deployments.sd3.precision import REQUESTABLE, choose_precision
from deployments.sd3.wire import to_wire
from loadtest import command_line
from loadtest.denoise_arms import diffusers_velocity, forget_garbage, relative_error
from loadtest.forward_timing import alternate
from loadtest.results import STDERR, Results
from loadtest.sd35 import MODELS, Inputs, config, largest_side, random_inputs, random_transformer

TARGET_RATIO = 1.15
TARGET_RANK = 16
_LAYERS = {
    "attention": (".attn.", ".attn2."),
    "all": (".attn.", ".attn2.", ".ff.", ".ff_context.", ".norm1.", ".norm1_context."),
}
_STRENGTH = 0.1  # of a branch's output beside its layer's
_WAIT_S = 600
_NOBODY = Stamp(replica="", pid=0, precision="", queue_s=0.0, seconds=0.0)


@dataclass(frozen=True)
class Placed:
    """One LoRA, and the pages that hold it."""

    layers: dict[str, LowRank]
    pages: tuple[int, ...]

    def uses(self, weight: float = 1.0) -> tuple[PageUse, ...]:
        """Return what adapts a row with it."""
        return tuple((page, weight) for page in self.pages)


def random_lora(
    mmdit: Mmdit, rank: int, layers: str, seed: int, strength: float = _STRENGTH
) -> dict[str, LowRank]:
    """Draw a LoRA of a model's shapes on its device, float32.

    Args:
        mmdit: With room for LoRAs.
        rank: Of every layer.
        layers: `attention` or `all`.
        seed: Equal seeds give equal ones on one kind of device.
        strength: Size of what a branch adds, beside an input and a layer's output of unit size.
    """
    assert mmdit.loras is not None
    generator = torch.Generator(mmdit.device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=mmdit.device)

    drawn = {}
    for branch in mmdit.loras.branches:
        for stream in branch.of.names:
            for name, columns in zip(stream, branch.of.columns, strict=True):
                if any(part in name for part in _LAYERS[layers]):
                    inputs = branch.of.inputs
                    drawn[name] = LowRank(
                        normal(rank, inputs) * inputs**-0.5,
                        normal(columns, rank) * strength * rank**-0.5,
                    )
    return drawn


def measure(options: argparse.Namespace, results: Results) -> None:
    """Run all phases; each is kept as soon as it is measured."""
    command_line.check_side(options.size, largest_side(options.model))
    device = torch.device(options.device)
    precision = choose_precision(options.precision, device)
    results.keep(precision={"label": precision.label, "reason": precision.reason})
    side = options.size // 8
    inputs = random_inputs(config(options.model), max(options.rows), side, side, device)
    model = random_transformer(options.model, device, torch.bfloat16)
    with torch.no_grad():
        exact = diffusers_velocity(model, _rows(inputs, 0, 2)).cpu()
    del model
    forget_garbage(device)
    mmdit = Mmdit.from_diffusers(
        random_transformer(options.model, device, torch.bfloat16), device, precision
    )
    forget_garbage(device)
    most_pages = options.loras * max(pages_of(rank) for rank in options.ranks)
    page_bytes = mmdit.lora_page_bytes()
    arena = mmdit.make_room_for_loras(most_pages)
    for rows in {*options.rows, 2}:
        mmdit.prepare(side, side, inputs.prompt_embeds.shape[1], rows)
    results.keep(memory={"page_mib": page_bytes / 2**20, "pages": most_pages, "bytes": arena.bytes})
    for layers in options.layers:
        for rank in options.ranks:
            placed, write_ms = _placed(mmdit, rank, layers, options.loras)
            for rows in options.rows:
                name = f"{layers}, rank {rank}, {rows} rows"
                results.keep_part(
                    "forwards", name, _forwards(mmdit, _rows(inputs, 0, rows), placed, options)
                )
            results.keep_part("write_ms_a_page", f"{layers}, rank {rank}", write_ms)
            if rank == TARGET_RANK:
                accuracy = _accuracy(mmdit, inputs, placed, exact, options)
                results.keep_part("accuracy", layers, accuracy)
    if options.requests:
        results.keep(engine=_engine(mmdit, inputs, options))


def _placed(mmdit: Mmdit, rank: int, layers: str, count: int) -> tuple[list[Placed], float]:
    """Put LoRAs into the model's pages; returns the median milliseconds of a page's copy too."""
    assert mmdit.loras is not None
    placed, took, page = [], [], 0
    for seed in range(count):
        drawn = random_lora(mmdit, rank, layers, seed)
        pages = []
        for content in mmdit.loras.pack(drawn):
            began = time.perf_counter()
            mmdit.loras.write(page, content)
            took.append(1000 * (time.perf_counter() - began))
            pages.append(page)
            page += 1
        placed.append(Placed(drawn, tuple(pages)))
    return placed, statistics.median(took)


def _forwards(
    mmdit: Mmdit, inputs: Inputs, placed: Sequence[Placed], options: argparse.Namespace
) -> dict[str, Any]:
    rows = len(inputs.latents)
    # A request's two rows have the same.
    uses = [placed[(row // 2) % len(placed)].uses() for row in range(rows)]
    one_row_only = [uses[0], *[()] * (rows - 1)]
    took = alternate(
        {
            "without": _step(mmdit, inputs, ()),
            "with": _step(mmdit, inputs, uses),
            "one_row": _step(mmdit, inputs, one_row_only),
        },
        options.steps,
        3,
        mmdit.device,
    )
    medians = {name: statistics.median(each) for name, each in took.items()}
    side, text = inputs.latents.shape[2], inputs.prompt_embeds.shape[1]
    return {
        **{f"{name}_ms": median for name, median in medians.items()},
        "ratio": medians["with"] / medians["without"],
        "ratio_where_one_row_is_adapted": medians["one_row"] / medians["without"],
        "path": mmdit.path(side, side, text, rows, True),
    }


def _accuracy(
    mmdit: Mmdit,
    inputs: Inputs,
    placed: Sequence[Placed],
    exact: Tensor,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Compare rows of a mixed batch with the same rows alone, and with weights that were fused."""
    rows = min(max(options.rows), 2 * len(placed))
    uses = [placed[row // 2].uses() for row in range(rows)]
    mixed = _step(mmdit, _rows(inputs, 0, rows), uses)()
    plain = _step(mmdit, _rows(inputs, 0, 2), ())()
    alone = [
        _step(mmdit, _rows(inputs, begin, begin + 2), uses[begin : begin + 2])()
        for begin in range(0, rows, 2)
    ]
    device = mmdit.device
    fused = random_transformer(options.model, device, torch.bfloat16)
    modules = dict(fused.named_modules())
    with torch.no_grad():
        for name, layer in placed[0].layers.items():
            weight: Any = modules[name].weight
            weight.copy_((weight.float() + layer.up @ layer.down).to(weight.dtype))
        expected = diffusers_velocity(fused, _rows(inputs, 0, 2)).cpu()
    del fused, modules
    forget_garbage(device)
    own_error = relative_error(plain, exact)
    differences = [
        relative_error(mixed[2 * at : 2 * at + 2], each) for at, each in enumerate(alone)
    ]
    return {
        "effect": relative_error(alone[0], plain),
        "mixed_against_alone": max(differences),
        "own_error_without_loras": own_error,
        "against_fused_bf16": relative_error(alone[0], expected),
        "finite": bool(torch.isfinite(mixed).all()),
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


def _engine(mmdit: Mmdit, inputs: Inputs, options: argparse.Namespace) -> dict[str, Any]:
    """Run requests of all kinds together, with LoRAs, without, and some of them alone."""
    assert mmdit.loras is not None
    source = _InMemory(mmdit, TARGET_RANK)
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


def _rows(inputs: Inputs, begin: int, end: int) -> Inputs:
    return Inputs(
        inputs.latents[begin:end],
        inputs.sigmas[begin:end],
        inputs.prompt_embeds[begin:end],
        inputs.pooled[begin:end],
    )


def _step(mmdit: Mmdit, inputs: Inputs, uses: Sequence[Sequence[PageUse]]) -> Callable[[], Tensor]:
    dtype = mmdit.precision.compute_dtype
    embeds, pooled = inputs.prompt_embeds.to(dtype), inputs.pooled.to(dtype)
    return lambda: mmdit.velocity(inputs.latents, inputs.sigmas, embeds, pooled, uses)


def targets_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a run must reach and whether it does: cost at rank 16, error at most FP8's."""
    targets: dict[str, dict[str, Any]] = {}
    for name, kept in report.get("forwards", {}).items():
        if f"rank {TARGET_RANK}," in name:
            ratio = kept["ratio"]
            targets[name] = {"at_most": TARGET_RATIO, "is": ratio, "met": ratio <= TARGET_RATIO}
    for layers, kept in report.get("accuracy", {}).items():
        most, found = kept["own_error_without_loras"], kept["mixed_against_alone"]
        targets[f"{layers}, as alone"] = {"at_most": most, "is": found, "met": found <= most}
    if (ratio := report.get("engine", {}).get("ratio")) is not None:
        targets["engine"] = {"at_most": TARGET_RATIO, "is": ratio, "met": ratio <= TARGET_RATIO}
    return targets


def table_of(report: dict[str, Any]) -> Table:
    """Return the times as a table."""
    table = Table(title=f"SD3.5 {report['model']}, {report['size']} px, {report['device']}")
    table.add_column("LoRAs of", no_wrap=True)
    for name in ("ms without", "ms with", "ratio", "one row adapted"):
        table.add_column(name, justify="right")
    for name, kept in report.get("forwards", {}).items():
        table.add_row(
            name,
            f"{kept['without_ms']:.1f}",
            f"{kept['with_ms']:.1f}",
            f"{kept['ratio']:.3f}",
            f"{kept['ratio_where_one_row_is_adapted']:.3f}",
        )
    return table


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.lora_bench", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    count = command_line.whole(1, 10_000)
    add("--model", default="large", choices=MODELS)
    add("--size", type=command_line.side, default=1024, help="side of the picture, pixels")
    add("--rows", type=command_line.rows, nargs="+", default=[2, 4], help="of the forwards")
    add("--ranks", type=command_line.whole(1, 256), nargs="+", default=[4, 16, 64, 128])
    add("--layers", nargs="+", choices=tuple(_LAYERS), default=list(_LAYERS))
    add("--loras", type=command_line.whole(1, 64), default=8, help="different ones in a batch")
    add("--steps", type=count, default=20, help="timed forwards of each arm")
    add("--requests", type=command_line.whole(0, 1000), default=20, help="through the engine")
    add("--request-steps", type=count, default=4, help="the fewest of a request")
    add("--compared", type=count, default=4, help="requests that are run alone as well")
    add("--precision", default="fp8", choices=REQUESTABLE)
    command_line.add_device_and_report(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit 1 where the model or the machine cannot do it."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


def _run(options: argparse.Namespace) -> None:
    diffusers.utils.logging.set_verbosity_error()
    known = command_line.known_before(
        "loadtest.lora_bench", options, "model", "size", "loras", "layers"
    )
    with Results(known, options.out, options.json) as results:
        try:
            measure(options, results)
        finally:
            results.keep(targets=targets_of(results.report))
            STDERR.print(table_of(results.report))


if __name__ == "__main__":
    sys.exit(main())
