"""Thousands of requests, right, wrong and absurd: none may be answered with a 500 or with insides.

    python -m loadtest.fuzz --cases 5000 --json

starts Kelvin with pico on this machine and sends cases over HTTP, made with schemathesis from the
OpenAPI document that it serves, and through the Python handle, made with hypothesis. Of each answer
it is asked whether it is a 500, tells of a stack or a path, is an error of another shape than its
door's, or is not what the document says. Exit 1 if any is; each fault comes with its seed and what
sends it again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest import command_line
from loadtest.fuzz_handle import HandleCases
from loadtest.fuzz_http import HttpCases
from loadtest.fuzz_tally import Tally
from loadtest.overhead import machine
from loadtest.results import STDERR, Results
from serve.app import APP_NAME
from serve.commands.output import stdout_is_for_json
from serve.commands.stopping import local_kelvin, stoppable
from serve.config import Settings, load_settings

_BY_HANDLE = 0.15  # of all cases
_ROUNDS = 20
_SEEDS_APART = 1_000_000


def fuzz(url: str, handle: Any, cases: int, seed: int, *, quiet: bool = False) -> Tally:
    """Send at least so many cases to a running service.

    Args:
        url: Of it.
        handle: Of it.
        cases: How many.
        seed: What all cases follow from, but for what depends on the answers: which jobs there are.
        quiet: Say nothing meanwhile.
    """
    tally = Tally(cases, quiet)
    http, by_handle = HttpCases(url, tally), HandleCases(handle, tally)
    try:
        for number in range(_ROUNDS):
            left = cases - tally.cases
            if left <= 0:
                break
            at = seed + number * _SEEDS_APART
            over_http = round(left * (1 - _BY_HANDLE))
            # By halves, so that jobs of one way are met by the other.
            http.run(max(1, over_http // 2), at)
            by_handle.run(max(1, left - over_http), at)
            http.run(max(1, over_http - over_http // 2), at + _SEEDS_APART // 2)
    finally:
        http.close()
    return tally


def settings_of(folder: Path) -> Settings:
    """Return the settings of the service that is fuzzed."""

    def pool(name: str) -> list[dict[str, Any]]:
        return [{"name": name, "torch_threads": 1}]

    return load_settings(
        overrides={
            "model": {"path": "pico"},
            "text_encoder": pool("text-encoder"),
            "denoiser": pool("denoiser"),
            "vae_decoder": pool("vae-decoder"),
            "http": {"port": 0},
            "embedded_store": {"data_dir": str(folder / "store")},
            "spool": {"directory": str(folder / "spool")},
        }
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of the fuzz."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.fuzz", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--cases", type=command_line.whole(1, 1_000_000), default=5000, help="at least so many")
    add("--seed", type=command_line.whole(0, 2**32), default=0)
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--out", type=command_line.file_to_write, help="file for the same JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz and report; exit 1 if anything was wrong."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


def _run(options: argparse.Namespace) -> int:
    known = {
        "command": command_line.command_of("loadtest.fuzz"),
        "machine": machine(),
        "seed": options.seed,
    }
    with (
        Results(known, options.out, options.json) as results,
        stdout_is_for_json(),
        stoppable(),
        tempfile.TemporaryDirectory(prefix="kelvin-fuzz-") as folder,
        local_kelvin(settings_of(Path(folder))) as kelvin,
    ):
        from ray import serve

        tally = fuzz(kelvin.url, serve.get_app_handle(APP_NAME), options.cases, options.seed)
        results.report |= tally.report() | {"ok": not tally.faulty_cases}
        STDERR.print(tally.table())
        for fault in tally.faults:
            STDERR.print_json(data=fault)
    return 1 if tally.faulty_cases else 0


if __name__ == "__main__":
    sys.exit(main())
