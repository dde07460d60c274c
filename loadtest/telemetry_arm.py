"""The service that `loadtest.telemetry_overhead` measures, with telemetry under a switch.

A process of its own: telemetry is set up before Ray starts, and a process has one Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from loadtest import telemetry_switch
from serve.config import load_settings
from serve.local import LocalKelvin


def main() -> None:
    """Serve until standard input ends; the first line of standard output says where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--otlp-endpoint", required=True)
    parser.add_argument("--switch", required=True, help="file of one byte")
    options = parser.parse_args()
    settings = load_settings(
        overrides={
            "model": {"path": options.model},
            "http": {"port": 0},
            "embedded_store": {"data_dir": options.data_dir},
            "telemetry": {"otlp_endpoint": options.otlp_endpoint},
        }
    )
    os.environ[telemetry_switch.FILE] = options.switch
    os.environ["RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"] = telemetry_switch.IMPORT_PATH
    with LocalKelvin(settings) as kelvin:
        print(json.dumps({"url": kelvin.url}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
