"""How far one velocity is from diffusers in float32: bf16, FP8, and FP8 in the Linears alone.

    python -m loadtest.fidelity --model large --json
    python -m loadtest.fidelity --model builtin --adherence 2000 --json

The yardsticks are what cannot be avoided: for Kelvin in bf16, the error of diffusers in bf16; for
Kelvin in FP8, the error of float32 arithmetic whose block Linears alone have weights and inputs
rounded to E4M3. Kelvin may have a tenth more. `--adherence` adds what the error does to pictures:
the loss of right pictures in FP8 against bf16 over paired prompts.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import diffusers
import torch
from rich.table import Table
from torch import Tensor

from deployments.sd3.mmdit import Mmdit
from deployments.sd3.precision import PrecisionChoice, choose_precision
from loadtest import adherence, command_line
from loadtest.denoise_arms import diffusers_velocity, forget_garbage
from loadtest.fidelity_models import MODELS, Subject, quantise_linears_alone, subject_of
from loadtest.results import STDERR, Results
from loadtest.sd35 import Inputs

MOST_RATIO = 1.1
MOST_LOSS = 0.02  # of right pictures, upper 95 % bound

_ROWS = 2  # in a forward


def measure(options: argparse.Namespace, results: Results) -> None:
    """Predict the same velocities in every way, one model at a time on the device."""
    device = torch.device(options.device)
    # Before anything is made: the machine may refuse.
    precisions = {arm: _choice(arm, options, device) for arm in ("bf16", "fp8")}
    _exact_float32()
    subject = subject_of(options.model, device)
    cases = subject.cases(options.seeds, options.sigmas, options.size)
    exact = _outputs_of_diffusers(subject, torch.float32, cases, device)
    found = _Errors(exact, results)
    model = subject.diffusers(torch.float32)
    quantise_linears_alone(model)
    found.add("linears_alone_fp8", _predict(partial(diffusers_velocity, model), cases))
    del model
    forget_garbage(device)
    found.add("diffusers_bf16", _outputs_of_diffusers(subject, torch.bfloat16, cases, device))
    for arm, precision in precisions.items():
        mmdit = subject.kelvin(precision)
        found.add(f"kelvin_{arm}", _predict(partial(_kelvin, mmdit), cases))
        results.keep(**{f"kelvin_{arm}_precision": f"{precision.label}: {precision.reason}"})
        del mmdit
        forget_garbage(device)
    results.keep(
        bf16=_verdict(found, "kelvin_bf16", "diffusers_bf16"),
        fp8=_verdict(found, "kelvin_fp8", "linears_alone_fp8"),
    )


def measure_adherence(options: argparse.Namespace, results: Results) -> None:
    """Compare what pictures show in FP8 and in bf16 over paired prompts."""
    arguments = ["--n", str(options.adherence), "--seen", "0", "--device", options.device]
    if options.reference:
        arguments += ["--reference", str(options.reference)]
    report = adherence.measure(adherence.parse_arguments(arguments))
    compared = report["fp8_against_bf16"]["all"]
    results.keep(
        adherence={
            **compared,
            "n": options.adherence,
            "at_most": MOST_LOSS,
            "met": compared["upper_95"] <= MOST_LOSS,
            "right": {
                name: {kind: arm[kind]["all_right"] for kind in ("core", "hard") if kind in arm}
                for name, arm in report["arms"].items()
            },
            "seconds": {name: arm["seconds"] for name, arm in report["arms"].items()},
        }
    )
    STDERR.print(f"adherence: upper 95 % bound of the loss {100 * compared['upper_95']:.2f} points")


class _Errors:
    """Relative errors of each way, case by case and over all."""

    def __init__(self, exact: list[Tensor], results: Results) -> None:
        self.exact = exact
        self.results = results
        self.each: dict[str, list[float]] = {}
        self.overall: dict[str, float] = {}

    def add(self, name: str, found: list[Tensor]) -> None:
        off = [
            float((a.double() - b.double()).norm()) for a, b in zip(found, self.exact, strict=True)
        ]
        size = [float(expected.double().norm()) for expected in self.exact]
        self.each[name] = [a / b for a, b in zip(off, size, strict=True)]
        self.overall[name] = _root_sum(off) / _root_sum(size)
        kept = {"overall": self.overall[name], "each": self.each[name]}
        self.results.keep_part("errors", name, kept)


def _verdict(found: _Errors, name: str, yardstick: str) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(found.each[name], found.each[yardstick], strict=True)]
    ratio = found.overall[name] / found.overall[yardstick]
    return {
        "error": found.overall[name],
        "yardstick": yardstick,
        "yardstick_error": found.overall[yardstick],
        "ratio": ratio,
        "median_ratio": statistics.median(ratios),
        "worst_ratio": max(ratios),
        "at_most": MOST_RATIO,
        "met": ratio <= MOST_RATIO,
    }


def _root_sum(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


def _outputs_of_diffusers(
    subject: Subject, dtype: torch.dtype, cases: Sequence[Inputs], device: torch.device
) -> list[Tensor]:
    model = subject.diffusers(dtype)
    outputs = _predict(partial(diffusers_velocity, model), cases)
    del model
    forget_garbage(device)
    return outputs


def _kelvin(mmdit: Mmdit, rows: Inputs) -> Tensor:
    dtype = mmdit.precision.compute_dtype
    return mmdit.velocity(
        rows.latents, rows.sigmas, rows.prompt_embeds.to(dtype), rows.pooled.to(dtype)
    )


def _predict(velocity: Callable[[Inputs], Tensor], cases: Sequence[Inputs]) -> list[Tensor]:
    """Return one velocity a row, float32 [C, h, w] on the host."""
    outputs: list[Tensor] = []
    with torch.no_grad():
        for case in cases:
            for rows in _in_twos(case):
                outputs += velocity(rows).float().cpu().unbind()
    return outputs


def _in_twos(case: Inputs) -> Iterator[Inputs]:
    for begin in range(0, len(case.latents), _ROWS):
        part = slice(begin, begin + _ROWS)
        yield Inputs(
            case.latents[part], case.sigmas[part], case.prompt_embeds[part], case.pooled[part]
        )


def _choice(name: str, options: argparse.Namespace, device: torch.device) -> PrecisionChoice:
    return choose_precision(name, device, pretend=options.pretend if name == "fp8" else None)


def _exact_float32() -> None:
    """No TF32: its eleven bits would be the reference's own error."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def table_of(report: dict[str, Any]) -> Table:
    """Return the errors as a table, a way a row."""
    table = Table(title=f"{report['model']} on {report['device']}: against diffusers float32")
    table.add_column("way", no_wrap=True)
    table.add_column("relative error", justify="right")
    table.add_column("against its yardstick")
    verdicts = {"kelvin_bf16": report.get("bf16"), "kelvin_fp8": report.get("fp8")}
    for name, errors in report.get("errors", {}).items():
        verdict = verdicts.get(name)
        words = ""
        if verdict is not None:
            met = "met" if verdict["met"] else "MISSED"
            words = f"{verdict['ratio']:.3f} of {verdict['yardstick']}, <= {MOST_RATIO}: {met}"
        table.add_row(name, f"{errors['overall']:.5f}", words)
    return table


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.fidelity", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--model", default="builtin", choices=(*MODELS, "none"), help="`none`: adherence only")
    add(
        "--size",
        type=command_line.side,
        help="side, pixels; 512 for random weights, else the model's own",
    )
    add("--seeds", type=command_line.whole(1, 1000), default=2, help="noises and prompts")
    add(
        "--sigmas",
        type=command_line.whole(1, 1000),
        default=10,
        help="noise levels: 1/n, 2/n, ..., 1",
    )
    add("--pretend", choices=("sm_86", "sm_89"), help="that card's FP8 path")
    add(
        "--adherence",
        type=command_line.whole(0, adherence.MOST_PROMPTS),
        default=0,
        metavar="N",
        help="paired prompts on the built-in model",
    )
    add(
        "--reference",
        type=command_line.existing_folder,
        help="folder of the built-in model before quantisation, for adherence",
    )
    command_line.add_device_and_report(parser)
    options = parser.parse_args(arguments)
    if options.model == "none" and not options.adherence:
        parser.error("--model none without --adherence N: there is nothing to do")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit 1 where the model or the machine cannot do it."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


def _run(options: argparse.Namespace) -> None:
    diffusers.utils.logging.set_verbosity_error()
    known = command_line.known_before("loadtest.fidelity", options, "model", "pretend")
    with Results(known, options.out, options.json) as results:
        if options.model != "none":
            try:
                measure(options, results)
            finally:
                STDERR.print(table_of(results.report))
        if options.adherence:
            measure_adherence(options, results)


if __name__ == "__main__":
    sys.exit(main())
