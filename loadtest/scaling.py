"""What a second card brings: Kelvin on one and on two, and two monolithic replicas of diffusers.

    python -m loadtest.scaling --json

Needs two NVIDIA GPUs. Whole services over HTTP, as `kelvin up` and Ray's own tutorial start them,
one after the other on the same cards with the same weights: SD3.5 Large at its real size with
random weights, 1024 x 1024, 28 steps, guidance. A card's worth of pictures for each card is asked
for at once, so that both of Kelvin's arms fill up and run empty alike. What lies between the stages
is told by Kelvin's own traces, of pictures made one after the other.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from loadtest import command_line
from loadtest.gpu_readings import GpuReadings
from loadtest.otlp_receiver import OtlpReceiver, otlp_receiver
from loadtest.overhead import machine
from loadtest.peer_servers import listening
from loadtest.random_model import write_random_model
from loadtest.results import STDERR, Results
from loadtest.scaling_arm import ARMS
from loadtest.scaling_turns import Asker, Size
from loadtest.sd35 import MODELS, TEXT_TOKENS, config
from loadtest.stage_transfers import STAGES, has_all, payloads_mib, since, transfers

LEAST_SPEED_UP = 1.9
_CARDS = {"kelvin-one": 1, "kelvin-two": 2, "monoliths": 2}
_WARM_UP_STEPS = 2
_WARM_UP_PICTURES = 4  # a card


def measure(options: argparse.Namespace, folder: Path, results: Results) -> None:
    """Write the model, and bring up and measure each arm after the other."""
    began = time.monotonic()
    write_random_model(options.dir, options.model, torch.device(options.device))
    results.keep(written_s=round(time.monotonic() - began, 1))
    joint_width = int(config(options.model)["joint_attention_dim"])
    on_card = options.device.startswith("cuda")
    payloads = payloads_mib(options.side, TEXT_TOKENS, joint_width, two_bytes=on_card)
    results.keep(payloads_mib=payloads)
    with otlp_receiver() as receiver:
        for name in options.arms:
            try:
                found = _arm(name, options, folder, receiver)
            except (RuntimeError, ExceptionGroup) as error:  # the others are measured all the same
                found = {"failed": f"{type(error).__name__}: {error!r}"[:3000]}
            results.keep_part("arms", name, found)
            results.keep(ratios=ratios_of(results.report["arms"]))
            results.keep(targets=targets_of(results.report["ratios"]))


def _arm(
    name: str, options: argparse.Namespace, folder: Path, receiver: OtlpReceiver
) -> dict[str, Any]:
    is_kelvin, cards = name != "monoliths", _CARDS[name]
    command = [sys.executable, "-m", "loadtest.scaling_arm", name, "--model", str(options.dir)]
    command += ["--side", str(options.side), "--device", options.device.split(":")[0]]
    if is_kelvin:
        command += ["--otlp-endpoint", receiver.endpoint]
    began = time.monotonic()
    with listening(name, command, folder / f"{name}.log") as server:
        up_s = time.monotonic() - began
        asker = Asker(is_kelvin, server.url, Size(options.side, options.steps))
        asker.together(cards * _WARM_UP_PICTURES, _WARM_UP_STEPS)
        warm_s = time.monotonic() - began - up_s
        begin_ns = time.time_ns()
        alone_s = [asker.together(1) for _ in range(options.alone)]
        found: dict[str, Any] = {"what": ARMS[name], "cards": cards}
        found |= {"up_s": round(up_s, 1), "warm_up_s": round(warm_s, 1), "alone_s": alone_s}
        if is_kelvin:
            # Spans come seconds late, those of the warm-up too.
            spans = receiver.wait(lambda spans: has_all(since(begin_ns, spans), options.alone))
            found["transfers"] = transfers(since(begin_ns, spans))
        return found | _saturated(asker, cards * options.pictures, cards, options)


def _saturated(
    asker: Asker, pictures: int, cards: int, options: argparse.Namespace
) -> dict[str, Any]:
    per_s, joules = [], []
    for _ in range(options.rounds):
        with ExitStack() as reading:
            devices = [torch.device("cuda", number) for number in range(cards)]
            watched = [
                reading.enter_context(GpuReadings(device))
                for device in devices
                if options.device.startswith("cuda")
            ]
            took = asker.together(pictures)
        per_s.append(pictures / took)
        joules.append([each.joules for each in watched])
    spent = [each for round_of in joules for each in round_of if each is not None]
    told = len(spent) == cards * options.rounds
    return {
        "asked_at_once": pictures,
        "pictures": pictures * options.rounds,
        "pictures_per_s": statistics.median(per_s),
        "pictures_per_s_by_round": per_s,
        "joules_per_picture": sum(spent) / (pictures * options.rounds) if told else None,
        "joules_by_card": joules,
    }


def ratios_of(arms: dict[str, Any]) -> dict[str, float]:
    """Return pictures a second of Kelvin on two cards over those of each other arm.

    Args:
        arms: Figures by arm.
    """
    ours = arms.get("kelvin-two", {}).get("pictures_per_s")
    if ours is None:
        return {}
    return {
        f"kelvin-two/{name}": ours / arm["pictures_per_s"]
        for name, arm in arms.items()
        if name != "kelvin-two" and "pictures_per_s" in arm
    }


def targets_of(ratios: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Return what must be reached, and whether it is."""
    return {
        name: {
            "at_least": LEAST_SPEED_UP,
            "is": ratios[name],
            "met": ratios[name] >= LEAST_SPEED_UP,
        }
        for name in ("kelvin-two/kelvin-one",)
        if name in ratios
    }


def table_of(report: dict[str, Any]) -> Table:
    """Return what was measured, an arm a row."""
    table = Table(title="Kelvin on one card and on two")
    table.add_column("arm", no_wrap=True)
    for name in ("cards", "pictures/s", "alone s", "J each", "kelvin-two is", "transfers ms"):
        table.add_column(name, justify="right")
    for name, arm in report.get("arms", {}).items():
        if "failed" in arm:
            table.add_row(name, "", "failed", arm["failed"][:60])
            continue
        ratio = report["ratios"].get(f"kelvin-two/{name}")
        joules = arm["joules_per_picture"]
        between = [arm.get("transfers", {}).get(stage) for stage in STAGES]
        table.add_row(
            name,
            str(arm["cards"]),
            f"{arm['pictures_per_s']:.3f}",
            f"{statistics.median(arm['alone_s']):.2f}",
            "" if joules is None else f"{joules:.0f}",
            "" if ratio is None else f"{ratio:.2f}x",
            ", ".join(str(each["transfer_ms"]) for each in between if each is not None),
        )
    table.caption = "Transfers: of a call of text, denoise and decode, what is not in its replica."
    return table


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.scaling", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="large")
    add("--side", type=command_line.side, default=1024, help="of every picture, pixels")
    add("--steps", type=command_line.whole(1, 200), default=28, help="of each")
    add("--pictures", type=command_line.whole(1, 256), default=24, help="at once for each card")
    add("--alone", type=command_line.whole(1, 100), default=4, help="one after the other")
    add("--rounds", type=command_line.whole(1, 100), default=2, help="of pictures at once")
    add("--arms", type=_arms, default=tuple(ARMS), help=", ".join(ARMS))
    add("--dir", type=command_line.folder_to_fill, help="where the model is kept")
    command_line.add_device_and_report(parser)
    options = parser.parse_args(arguments)
    options.dir = (
        options.dir or Path(tempfile.gettempdir()) / f"kelvin-random-{options.model}-whole"
    )
    if options.device.startswith("cuda") and torch.cuda.device_count() < max(
        _CARDS[name] for name in options.arms
    ):
        parser.error("two NVIDIA GPUs are needed; --device cpu tries it out")
    return options


def _arms(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(ARMS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}; of {', '.join(ARMS)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit 1 where a target is missed or was not measured."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


def _run(options: argparse.Namespace) -> int:
    names = ("model", "side", "steps", "pictures", "rounds")
    known = command_line.known_before("loadtest.scaling", options, *names)
    known |= {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
    with (
        tempfile.TemporaryDirectory(prefix="kelvin-scaling-") as folder,
        Results(known, options.out, options.json) as results,
    ):
        try:
            measure(options, Path(folder), results)
        finally:
            STDERR.print(table_of(results.report))
    targets = results.report.get("targets", {})
    return int(not targets or not all(each["met"] for each in targets.values()))


if __name__ == "__main__":
    sys.exit(main())
