"""One of the two services that `loadtest.telemetry_overhead` compares, and the collector for it.

A process each: telemetry is set up before Ray starts, and a process has one Ray.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from loadtest.otlp_sink import otlp_sink
from serve.config import load_settings
from serve.local import LocalKelvin


class Collector:
    """Takes OTLP over HTTP and throws it away; what it costs is not Kelvin's."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.messages = 0
        self.bytes = 0


@contextmanager
def collector() -> Iterator[Collector]:
    """Run one on a free port of loopback."""
    running = Collector()

    def count(path: str, body: bytes, encoding: str | None) -> None:
        running.messages += 1
        running.bytes += len(body)

    with otlp_sink(count) as running.endpoint:
        yield running


def main() -> None:
    """Serve until standard input ends; the first line of standard output says where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--otlp-endpoint")
    options = parser.parse_args()
    settings = load_settings(
        overrides={
            "model": {"path": options.model},
            "http": {"port": 0},
            "embedded_store": {"data_dir": options.data_dir},
            "telemetry": {"otlp_endpoint": options.otlp_endpoint},
        }
    )
    with LocalKelvin(settings) as kelvin:
        print(json.dumps({"url": kelvin.url}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
