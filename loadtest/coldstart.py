"""How soon a denoiser serves after its process starts, and whether anything compiles later.

    python -m loadtest.coldstart --json

Writes a transformer of SD3.5's real size in Kelvin's FP8 format once, then starts a denoiser on it
twice in a process of its own: the first start fills the caches on disk, the second is the one that
counts, from the start of the process to the first finished step. The second goes on with requests
over twelve sizes, most of them never prepared; nothing may compile for them.

    python -m loadtest.coldstart --s3 --json

How fast a model's files come to a cold node from an S3 store (`loadtest.coldstart_s3`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loadtest import command_line
from loadtest.overhead import machine
from loadtest.results import STDERR, Results
from loadtest.sd35 import largest_side

LONGEST_START_S = 60.0

_MODELS = ("large", "medium", "tiny", "tiny-dual")


def measure(options: argparse.Namespace, results: Results) -> None:
    """Write the checkpoint if it is not there, start twice, send requests."""
    began = time.monotonic()
    for event in _run("write", options):
        results.keep_part(
            "checkpoint", event["event"], event | {"seconds": time.monotonic() - began}
        )
    for start in range(options.starts):
        is_last = start == options.starts - 1
        name = "start" if is_last else f"start_{start + 1}_fills_caches"
        requests = options.requests if is_last else 0
        before = 0.0
        for event in _run("start", options, requests):
            if event["event"] == "phase":
                took = event["at_s"] - before
                before = event["at_s"]
                results.keep_part(name, event["name"], {"seconds": took, "at_s": before})
            else:
                results.keep_part(name, event["event"], event)
                if event["event"] in ("ready", "requests"):
                    results.keep(targets=targets_of(results.report))


def targets_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what the last start must reach and whether it does."""
    start = report.get("start", {})
    targets: dict[str, dict[str, Any]] = {}
    if "ready" in start:
        seconds = start["ready"]["seconds"]
        met = seconds <= LONGEST_START_S
        targets["first_step_s"] = {"at_most": LONGEST_START_S, "is": seconds, "met": met}
    if "requests" in start:
        compiled = start["requests"]["compiled"]
        targets["compiled"] = {"at_most": 0, "is": compiled, "met": compiled == 0}
        failed = start["requests"]["failed"]
        targets["failed"] = {"at_most": 0, "is": failed, "met": failed == 0}
    return targets


def _run(role: str, options: argparse.Namespace, requests: int = 0) -> Iterator[dict[str, Any]]:
    """Run a role in a new process; yield its events as they come."""
    command = [sys.executable, "-m", "loadtest.coldstart_child", role]
    command += ["--model", options.model, "--device", options.device, "--dir", str(options.dir)]
    command += ["--size", str(options.size), "--requests", str(requests)]
    command += ["--steps", str(options.steps), "--warm-rows", options.warm_rows]
    # The monotonic clock is the machine's, so the child counts from before it was there.
    command += ["--began", repr(time.monotonic())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            for line in child.stdout or ():
                if line.startswith("{"):
                    yield json.loads(line)
                else:
                    STDERR.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)
        finally:
            if child.poll() is None:
                child.terminate()
    if child.returncode:
        yield {"event": "failed", "exit_code": child.returncode}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.coldstart", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--model", default="large", choices=_MODELS)
    add("--size", type=command_line.side, default=1024, help="side of the first picture, pixels")
    add(
        "--starts",
        type=command_line.whole(0, 100),
        default=2,
        help="the last one is measured; 0: only the checkpoint",
    )
    add(
        "--requests",
        type=command_line.whole(0, 1_000_000),
        default=1000,
        help="after the last start; 0: none",
    )
    add("--steps", type=command_line.whole(1, 200), default=2, help="of each request")
    add("--warm-rows", default="", help="rows to prepare, comma-separated; as served if absent")
    add("--dir", type=command_line.folder_to_fill, help="where the checkpoint is kept")
    add("--device", help="cuda, which is the default, or cpu")
    add("--s3", action="store_true", help="only: a model's files from an S3 store to this node")
    add("--gib", type=command_line.number(0.01, 100), default=1.5, help="with --s3: of files")
    add("--rounds", type=command_line.whole(1, 100), default=5, help="with --s3")
    add(
        "--out",
        type=command_line.file_to_write,
        help="file that holds the report after every phase",
    )
    add("--json", action="store_true", help="JSON on standard output")
    options = parser.parse_args(arguments)
    if options.s3:
        return options
    try:
        options.device = command_line.device(options.device or "cuda")
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --device: {error}")
    options.dir = options.dir or Path(tempfile.gettempdir()) / f"kelvin-random-{options.model}"
    try:
        for rows in filter(None, options.warm_rows.split(",")):
            command_line.rows(rows)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --warm-rows: {error}, comma-separated")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit 1 if a process failed."""
    return command_line.run_in_words(_run_all, parse_arguments(arguments))


def _run_all(options: argparse.Namespace) -> int:
    if options.s3:
        return _run_s3(options)
    command_line.check_side(options.size, largest_side(options.model))
    known = {
        "command": command_line.command_of("loadtest.coldstart"),
        "model": options.model,
        "size": options.size,
        "cores": os.cpu_count(),
    }
    with Results(known, options.out, options.json) as results:
        measure(options, results)
    phases = (value for name, value in results.report.items() if name != "targets")
    return int(any("failed" in phase for phase in phases if isinstance(phase, dict)))


def _run_s3(options: argparse.Namespace) -> int:
    # boto3 comes with the extra `loadtest` alone.
    from loadtest import coldstart_s3

    known = {
        "command": command_line.command_of("loadtest.coldstart"),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "load_average_before": os.getloadavg(),
    }
    with Results(known, options.out, options.json) as results:
        coldstart_s3.measure(options.gib, options.rounds, results)
    return int(not all(each["met"] for each in results.report["targets"].values()))


if __name__ == "__main__":
    sys.exit(main())
