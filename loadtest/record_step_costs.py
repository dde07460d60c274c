"""Records what forwards take on this machine's card: the curve that `loadtest.engine_bench` reads.

`python -m loadtest.record_step_costs --model large --out FILE` makes every bucket ready as the
denoiser's start-up does, keeps the card busy until it is as warm as under load, and takes medians
by CUDA events. Random weights: what they are does not change how long they take.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from deployments.sd3.mmdit import Mmdit
from deployments.sd3.precision import REQUESTABLE
from deployments.step_costs import StepCosts
from loadtest import command_line
from loadtest.arrivals import TEXT_TOKENS, square
from loadtest.cost_files import write_recording
from loadtest.denoise_arms import kelvin_step
from loadtest.forward_timing import time_steps
from loadtest.results import STDERR
from loadtest.sd35 import MODELS, random_inputs, random_transformer
from serve.config import ModelSettings
from serve.errors import InvalidRequest
from serve.model_dir import resolve_model_dir

BROUGHT_ALONG = ("pico", "builtin")
SIDES = (512, 768, 1024)
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)
# As many tokens as 8 rows of 1024x1024: beyond, the curves are flat and a forward takes a second.
_MOST_TOKENS = 36_000


def load_mmdit(model: str, device: torch.device, precision: str) -> Mmdit:
    """Return Kelvin's transformer: at SD3.5's sizes with random weights, or one it brings along.

    Args:
        model: As `loadtest.sd35.config` takes it; or `pico` or `builtin`.
        device: Where it is made.
        precision: As `choose_precision` takes it.
    """
    if model in BROUGHT_ALONG:
        return Mmdit.load(resolve_model_dir(ModelSettings(path=model)), device, precision)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformer = random_transformer(model, device, dtype)
    return Mmdit.from_diffusers(transformer, device, precision)


def record(
    mmdit: Mmdit, sides: Sequence[int], rows: Sequence[int], warm_s: float, number: int
) -> StepCosts:
    """Prepare and time forwards.

    Args:
        mmdit: On its device.
        sides: Of square pictures, in pixels.
        rows: Counts to try; more tokens than 8 rows of 1024x1024 are left out.
        warm_s: Seconds of work before the first timing: a card that was idle clocks higher.
        number: Forwards a bucket, of which the median counts.

    Raises:
        InvalidRequest: A side is larger than the model's, or nothing is left to time.
    """
    costs = StepCosts()
    takes = {
        "in_channels": mmdit.in_channels,
        "joint_attention_dim": mmdit.joint_attention_dim,
        "pooled_projection_dim": mmdit.pooled_projection_dim,
    }
    steps = {}
    for side in sides:
        command_line.check_side(side, mmdit.largest_side)
        shape = square(side)
        for count in rows:
            if count > 1 and count * shape.tokens > _MOST_TOKENS:
                break
            mmdit.prepare(shape.height, shape.width, shape.text_tokens, count)
            inputs = random_inputs(takes, count, shape.height, shape.width, mmdit.device)
            steps[shape, count] = kelvin_step(mmdit, inputs)
            steps[shape, count]()
    if not steps:
        raise InvalidRequest(
            "Of these rows and sides nothing is left to time.",
            field="rows",
            value=str(list(rows)),
            allowed=f"1, or at most {_MOST_TOKENS} tokens in a forward",
        )
    warm_until = time.monotonic() + warm_s
    largest = list(steps.values())[-1]
    while time.monotonic() < warm_until:
        time_steps(largest, 4, mmdit.device)  # waits for the card at its end
    for (shape, count), step in steps.items():
        took = time_steps(step, number, mmdit.device)
        costs.observe(shape, count, statistics.median(took) / 1000)
    return costs


def provenance(mmdit: Mmdit, command: str) -> dict[str, Any]:
    """Return where figures measured now come from."""
    cuda = mmdit.device.type == "cuda"
    return {
        "source": "recorded with Kelvin's own forward, random weights",
        "preliminary": False,
        "device": torch.cuda.get_device_name(mmdit.device) if cuda else "CPU",
        "precision": mmdit.precision.label,
        "torch": torch.__version__,
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "text_tokens": TEXT_TOKENS,
    }


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this recording."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.record_step_costs", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--model", choices=(*MODELS, *BROUGHT_ALONG), required=True)
    parser.add_argument(
        "--out",
        type=command_line.file_to_write,
        required=True,
        help="other models in it are kept",
    )
    parser.add_argument("--device", type=command_line.device, default="cuda")
    parser.add_argument("--precision", default="auto", choices=REQUESTABLE)
    parser.add_argument("--sides", type=command_line.side, nargs="+", default=SIDES, help="pixels")
    parser.add_argument("--rows", type=command_line.rows, nargs="+", default=ROWS)
    parser.add_argument(
        "--warm-s", type=command_line.seconds, default=8.0, help="of work before timing"
    )
    parser.add_argument(
        "--number",
        type=command_line.whole(1, 10_000),
        default=9,
        help="forwards timed for each bucket",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Record one model into a file; exit 1 where the model or the machine cannot do it."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


def _run(options: argparse.Namespace) -> None:
    mmdit = load_mmdit(options.model, torch.device(options.device), options.precision)
    costs = record(
        mmdit, sorted(options.sides), sorted(options.rows), options.warm_s, options.number
    )
    command = f"python -m loadtest.record_step_costs --model {options.model} --out FILE"
    entry = write_recording(options.out, options.model, costs, provenance(mmdit, command))
    for cost in entry["costs"]:
        side, rows, seconds = cost["height"] * 8, cost["rows"], cost["seconds"]
        line = f"{side}x{side}, {rows} rows: {seconds * 1000:.2f} ms, {seconds * 1000 / rows:.2f}"
        STDERR.print(f"{line} a row", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
