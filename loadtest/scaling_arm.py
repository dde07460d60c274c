"""One arm of `loadtest.scaling` as a server: a process that says where it listens.

    python -m loadtest.scaling_arm kelvin-two --model FOLDER --side 1024 --device cuda --said FILE

It runs until SIGTERM. Kelvin is what `kelvin up` starts, with a store of its own.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from loadtest.peer_servers import serve_on_ray, tell
from serve.commands.stopping import end_process, local_kelvin, stoppable, wait_for_stop
from serve.config import load_settings

ARMS = {
    "kelvin-one": "Kelvin, all three stages on one card",
    "kelvin-two": "Kelvin, a denoiser on each of two cards, text and decoding sharing them",
    "monoliths": "two replicas of diffusers' pipeline on Ray Serve, a card each",
}

# Of a card. On two, text shares one with a denoiser and decoding the other, because the three do
# not fit on one: Ray fills a card up to 1.
_DENOISER, _SMALL_ON_ONE, _SMALL_ON_TWO = 0.6, 0.2, 0.4


def kelvin_overrides(
    arm: str, model: str, side: int, device: str, data_dir: str, otlp_endpoint: str | None
) -> dict[str, Any]:
    """Return the settings of one of Kelvin's arms, as a configuration file has them.

    Args:
        arm: `kelvin-one` or `kelvin-two`.
        model: Folder.
        side: pixels, that start-up makes fast.
        device: `cuda`, or `cpu` for trying it out.
        data_dir: Of the store.
        otlp_endpoint: Where traces go.
    """
    cards = 2 if arm == "kelvin-two" else 1
    on_card = device == "cuda"
    small = {"num_gpus": on_card * (_SMALL_ON_TWO if cards == 2 else _SMALL_ON_ONE)}
    warm = {"warm_sizes": [[side, side]]}
    denoiser = {"num_replicas": cards, "num_gpus": on_card * _DENOISER, **warm}
    return {
        "model": {"path": model},
        "text_encoder": [{"name": "text-encoder", **small}],
        "denoiser": [{"name": "denoiser", **denoiser}],
        "vae_decoder": [{"name": "vae-decoder", **small, **warm}],
        "http": {"port": 0},
        "embedded_store": {"data_dir": data_dir},
        "telemetry": {"otlp_endpoint": otlp_endpoint},
    }


def _serve_kelvin(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="kelvin-scaling-") as folder:
        endpoint = options.otlp_endpoint
        overrides = kelvin_overrides(
            options.name, options.model, options.side, options.device, folder, endpoint
        )
        with local_kelvin(load_settings(overrides=overrides)) as kelvin:
            tell(options.said, kelvin.url)
            wait_for_stop()


def _monoliths(options: argparse.Namespace) -> Any:
    from loadtest.peer_ray_apps import tutorial

    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    return tutorial(options.model, threads, options.device, 2)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.scaling_arm")
    parser.add_argument("name", choices=tuple(ARMS))
    parser.add_argument("--model", required=True, help="folder in Diffusers layout")
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--otlp-endpoint")
    parser.add_argument("--said", type=Path, required=True, help="file that gets the URL")
    options = parser.parse_args()
    if options.name == "kelvin-one":
        # Ray finds what is visible; one card must not become two by Serve's choice.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
    try:
        with stoppable():
            if options.name == "monoliths":
                serve_on_ray(lambda: _monoliths(options), options.said)
            else:
                _serve_kelvin(options)
    except KeyboardInterrupt:
        end_process(0)


if __name__ == "__main__":
    main()
