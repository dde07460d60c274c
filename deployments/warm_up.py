"""What a denoiser does before its first request: makes the usual forwards fast and measures them.

It has made a step at every size with and without guidance and at every row count that was set, or
it does not become ready; what there is no memory for it never tries later. Nothing compiles while
requests wait. A size or row count that was not made ready runs on a slower path and its progress
says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from deployments.device_errors import is_out_of_memory
from deployments.job_size import LATENT_PIXELS
from deployments.live_request import VelocityModel
from deployments.memory_budget import MemoryBudget
from deployments.sd3.stored_tensors import read_json
from deployments.step_costs import StepCosts, TokenShape
from deployments.warm_step import make_step
from serve.errors import ConfigurationError

# A picture without guidance, and one with it.
_KINDS = (1, 2)
# Without gaps, so that whatever the policy chooses was captured.
_CUDA_ROWS = tuple(range(1, 17))
# A laptop must be ready soon; whether two guided pictures share a forward is all it must know. The
# other stages start on the same cores meanwhile, so counts are timed in turns: of the least that
# each took the proportions hold.
_CPU_ROWS = (*_KINDS, 4)
_CPU_SECONDS = 2.5
_CPU_TURNS = 3
_GAIN_WORTH_MORE_ROWS = 0.03
_TIMED = {"cpu": 1, "cuda": 3}

_log = logging.getLogger(__name__)


class WarmableModel(VelocityModel, Protocol):
    """A model whose forwards can be made ready; `deployments.sd3.mmdit.Mmdit` is one."""

    joint_attention_dim: int
    pooled_projection_dim: int
    largest_side: int  # of the latents

    def prepare(self, height: int, width: int, text_tokens: int, rows: int) -> None:
        """Make forwards of one shape as fast as they get; sides of the latents."""


@dataclass(frozen=True)
class Warmed:
    """What start-up found out, for the engine."""

    costs: StepCosts
    memory: MemoryBudget
    prepared_rows: dict[TokenShape, int]  # the most of each shape that replay a CUDA graph


def text_tokens_of(model_dir: Path, max_sequence_length: int) -> int:
    """Return the length of a prompt's embedding: CLIP's tokens, then T5's.

    Raises:
        ConfigurationError: CLIP's tokenizer does not state its length.
    """
    path = model_dir / "tokenizer" / "tokenizer_config.json"
    length = read_json(path).get("model_max_length")
    if not isinstance(length, int):
        raise ConfigurationError(
            "The tokenizer states no `model_max_length`.", field="model.path", value=str(path)
        )
    return length + max_sequence_length


def warm_up(
    model: WarmableModel,
    sizes: Sequence[tuple[int, int]],
    text_tokens: int,
    rows: Sequence[int] = (),
) -> Warmed:
    """Prepare and time forwards.

    Args:
        model: Loaded.
        sizes: Width and height in pixels.
        text_tokens: Of a prompt's embedding.
        rows: Of the forwards, beside the one and two rows of a picture without and with guidance;
            if empty as many more, by device, as make a row cheaper.

    Raises:
        ConfigurationError: A size that the model cannot draw, or no memory for the two rows of one
            guided picture.
        StageFailed: The model's weights make no finite step.
    """
    on_cpu = model.device.type == "cpu"
    needed = {*_KINDS, *rows}
    counts = sorted(needed.union(() if rows else _CPU_ROWS if on_cpu else _CUDA_ROWS))
    give_up_at = time.monotonic() + _CPU_SECONDS if on_cpu else float("inf")
    costs, bytes_per_token = StepCosts(), 0.0
    prepared: dict[TokenShape, int] = {}
    for width, height in sizes:
        shape = TokenShape(height // LATENT_PIXELS, width // LATENT_PIXELS, text_tokens)
        if max(shape.height, shape.width) > model.largest_side:
            raise ConfigurationError(
                "A size to warm up is larger than the model draws.",
                field="denoiser.warm_sizes",
                value=f"{width}x{height}",
                allowed=f"sides of at most {model.largest_side * LATENT_PIXELS} pixels",
            )
        done: dict[int, float] = {}
        try:
            peak = _peak_bytes(model, shape)
            bytes_per_token = max(bytes_per_token, peak / (2 * shape.tokens))
            for count, took in _warmed_counts(model, shape, counts, needed, costs, give_up_at):
                done[count] = took
                if model.path(shape.height, shape.width, text_tokens, count) == "graph":
                    prepared[shape] = count
            if on_cpu:
                _take_turns(model, shape, done, give_up_at)
                costs.observe_in_proportion(shape, done)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # Where there is none to prepare them they run as they are.
            _make_steps(model, shape, set(_KINDS) - set(done))
            _log.warning("no memory to warm up more rows of %dx%d pixels", width, height)
    known = {"bytes_per_token": bytes_per_token} if bytes_per_token else {}
    return Warmed(costs, MemoryBudget.of_device(model.device, **known), prepared)


def _make_steps(model: WarmableModel, shape: TokenShape, counts: Collection[int]) -> None:
    try:
        for rows in sorted(counts):
            _step(model, shape, rows)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigurationError(
            "The memory beside the model's weights is too small for one guided picture.",
            field="denoiser.warm_sizes",
            value=f"{shape.width * LATENT_PIXELS}x{shape.height * LATENT_PIXELS}",
            allowed="smaller sizes, a smaller precision, or a larger card",
        ) from error


def _step(model: WarmableModel, shape: TokenShape, rows: int) -> None:
    make_step(model, shape, rows, (model.joint_attention_dim, model.pooled_projection_dim))


def _warmed_counts(
    model: WarmableModel,
    shape: TokenShape,
    counts: Sequence[int],
    needed: Collection[int],
    costs: StepCosts,
    give_up_at: float,
) -> Iterator[tuple[int, float]]:
    """Prepare, step and time one row count after the other; yields each, and its seconds."""
    best, without_gain = float("inf"), 0
    for rows in counts:
        if rows not in needed and (without_gain >= 2 or time.monotonic() > give_up_at):
            return
        model.prepare(shape.height, shape.width, shape.text_tokens, rows)
        _step(model, shape, rows)
        took = _seconds(model, shape, rows)
        if model.device.type != "cpu":
            costs.observe(shape, rows, took)
        yield rows, took
        per_row = took / rows
        # Twice, for a count may fit the card's tiles badly and the next one well. Against the last
        # gain that was worth it, so that small ones add up.
        if per_row < best * (1 - _GAIN_WORTH_MORE_ROWS):
            best, without_gain = per_row, 0
        else:
            without_gain += 1


def _seconds(model: WarmableModel, shape: TokenShape, rows: int) -> float:
    forward = _random_forward(model, shape, rows)
    measured: list[float] = []
    for _ in range(_TIMED[model.device.type]):
        began = time.perf_counter()
        forward()
        measured.append(time.perf_counter() - began)
    return median(measured)


def _take_turns(
    model: WarmableModel, shape: TokenShape, least: dict[int, float], give_up_at: float
) -> None:
    """Time row counts again, in turns while there is time, and keep the least that each took."""
    forwards = {rows: _random_forward(model, shape, rows) for rows in least}
    for _ in range(_CPU_TURNS):
        for rows, forward in forwards.items():
            if time.monotonic() > give_up_at:
                return
            began = time.perf_counter()
            forward()
            least[rows] = min(least[rows], time.perf_counter() - began)


def _peak_bytes(model: WarmableModel, shape: TokenShape) -> int:
    """Return the peak of a forward of two rows that nothing was prepared for; 0 on a CPU."""
    if model.device.type != "cuda":
        return 0
    forward = _random_forward(model, shape, 2)
    forward()  # libraries keep what they allocate on first use
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    forward()
    return int(torch.cuda.max_memory_allocated(model.device) - before)


def _random_forward(model: WarmableModel, shape: TokenShape, rows: int) -> Callable[[], Any]:
    dtype, device = model.precision.compute_dtype, model.device
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*sides: int) -> torch.Tensor:
        return torch.randn(sides, generator=generator).to(device, dtype)

    inputs = (
        random(rows, model.in_channels, shape.height, shape.width).float(),
        torch.full((rows,), 0.5, device=device),
        random(rows, shape.text_tokens, model.joint_attention_dim),
        random(rows, model.pooled_projection_dim),
    )

    def forward() -> None:
        model.velocity(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return forward
