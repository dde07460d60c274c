"""The service that `loadtest.telemetry_overhead` measures, with telemetry under a switch.

A process of its own: telemetry is set up before Ray starts, and a process has one Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from loadtest import telemetry_switch
from loadtest.scaling_arm import kelvin_overrides
from serve.config import load_settings
from serve.http import proxy_headers
from serve.local import LocalKelvin


def main() -> None:
    """Serve until standard input ends; the first line of standard output says where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--otlp-endpoint", required=True)
    parser.add_argument("--switch", required=True, help="file of one byte")
    parser.add_argument("--on-card", action="store_true", help="all stages on one GPU")
    parser.add_argument("--side", type=int, help="pixels, that start-up makes fast there")
    options = parser.parse_args()
    settings = load_settings(overrides=_overrides(options))
    os.environ[telemetry_switch.FILE] = options.switch
    os.environ |= telemetry_switch.ENVIRONMENT
    proxy_headers.ENVIRONMENT.update(telemetry_switch.ENVIRONMENT)  # else it would come back
    with LocalKelvin(settings) as kelvin:
        print(json.dumps({"url": kelvin.url}), flush=True)
        sys.stdin.read()


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    if options.on_card:
        return kelvin_overrides(
            *("kelvin-one", options.model, options.side, "cuda"),
            *(options.data_dir, options.otlp_endpoint),
        )
    return {
        "model": {"path": options.model},
        "http": {"port": 0},
        "embedded_store": {"data_dir": options.data_dir},
        "telemetry": {"otlp_endpoint": options.otlp_endpoint},
    }


if __name__ == "__main__":
    main()
