"""NVIDIA's `aiperf` profiles the OpenAI door for a minute: a tool that knows nothing of us.

    python -m loadtest.aiperf --json

Installs the tool as it is published (a gigabyte, once, in an environment of its own under the
user's cache), starts Kelvin on this machine and lets it send held-out prompts. What must be seen:
no request failed, it ran its time and to its end, and it received as many pictures as Kelvin says
it stored for it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest import aiperf_tool, command_line
from loadtest.door_clients import Connection, own_model
from loadtest.overhead import machine
from loadtest.results import STDERR, Results
from loadtest.trials import held_out_prompts
from serve.commands.output import stdout_is_for_json
from serve.commands.stopping import local_kelvin, stoppable
from serve.config import Settings, load_settings
from serve.model_dir import resolve_model_dir

_PROMPTS = 64
_SIDE = 256  # pixels, of the scenes that the prompts state


def settings_of(model: str, folder: Path) -> Settings:
    """Return the settings of a Kelvin on this machine."""
    return load_settings(
        overrides={
            "model": {"path": model},
            "http": {"port": 0},
            "embedded_store": {"data_dir": str(folder / "store")},
        }
    )


def _images(url: str) -> int:
    with Connection(url) as connection:
        return int(json.loads(connection.ask("GET", "/v1/usage"))["images"])


def _profiled(options: argparse.Namespace, results: Results) -> None:
    tool = aiperf_tool.installed(options.aiperf and aiperf_tool.existing_tool(options.aiperf))
    prompts = [drawn.prompt for _, drawn in held_out_prompts(_PROMPTS, 0, _SIDE, _SIDE)]
    body = {} if options.steps is None else {"num_inference_steps": options.steps}
    with tempfile.TemporaryDirectory(prefix="kelvin-aiperf-") as name:
        folder = Path(name)
        settings = settings_of(options.model, folder)
        with local_kelvin(settings) as kelvin:
            with Connection(kelvin.url) as connection:
                connection.ask("POST", "/v1/generate", {"prompt": prompts[0], **body})
                model = own_model(connection)
            before = _images(kelvin.url)
            exported = aiperf_tool.profile(
                tool,
                kelvin.url,
                model,
                resolve_model_dir(settings.model) / "tokenizer_3",
                prompts,
                folder,
                seconds=options.seconds,
                concurrency=options.concurrency,
                streaming=options.streaming,
                body=body,
            )
            stored = _images(kelvin.url) - before
    found = aiperf_tool.figures(exported)
    faults = aiperf_tool.faults(found, options.seconds, stored)
    results.keep(
        aiperf=exported.get("aiperf_version"),
        **found,
        pictures_stored=stored,
        faults=faults,
        ok=not faults,
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.aiperf", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--seconds", type=command_line.number(1, 3600), default=60.0, help="it sends for so long")
    add("--concurrency", type=command_line.whole(1, 64), default=2, help="requests at a time")
    add("--model", default="builtin", choices=("builtin", "pico"))
    add(
        "--steps",
        type=command_line.whole(1, 200),
        help="of each request; the model's own if absent",
    )
    add("--streaming", action="store_true", help="pictures come as server-sent events")
    add("--aiperf", help="executable of one that is installed already")
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--out", type=command_line.file_to_write, help="file for the same JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile and report; exit 1 if anything was wrong."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


def _run(options: argparse.Namespace) -> int:
    known: dict[str, Any] = {
        "command": command_line.command_of("loadtest.aiperf"),
        "machine": machine() | {"load_before": os.getloadavg()[0]},
        "model": options.model,
        "concurrency": options.concurrency,
        "streaming": options.streaming,
    }
    with Results(known, options.out, options.json) as results, stdout_is_for_json(), stoppable():
        _profiled(options, results)
        for fault in results.report["faults"]:
            STDERR.print(fault, markup=False)
    return 0 if results.report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
