"""One traced request through a Kelvin of its own; prints what a collector and a scraper saw.

A process of its own, because a process has one Ray, and Ray Serve reads its tracing settings once.
"""

import json
import sys
import time
from dataclasses import asdict
from typing import Any

import httpx
import ray

from serve.config import load_settings
from serve.local import LocalKelvin
from tests.otlp_receiver import otlp_receiver

_SPANS = {"generate_content kelvin-pico", "kelvin.store"}
_DEPLOYMENTS = {"pipeline", "text-encoder", "denoiser", "vae-decoder"}
_STAGES = ("text", "denoise", "decode", "store")
_SAMPLES = ("kelvin_images_total", "kelvin_jobs_total", *(f'stage="{s}"' for s in _STAGES))


def main(data_dir: str, trace_id: str) -> None:
    """Make two pictures under this trace id and print spans and metrics as JSON."""
    with otlp_receiver() as receiver:

        def pool(name: str) -> list[dict[str, Any]]:
            return [{"name": name, "torch_threads": 1}]

        settings = load_settings(
            overrides={
                "model": {"path": "pico"},
                "text_encoder": pool("text-encoder"),
                "denoiser": pool("denoiser"),
                "vae_decoder": pool("vae-decoder"),
                "http": {"port": 0},
                "embedded_store": {"data_dir": data_dir},
                "telemetry": {"otlp_endpoint": receiver.endpoint, "service_name": "traced"},
            }
        )
        with LocalKelvin(settings) as kelvin:
            answer = httpx.post(
                f"{kelvin.url}/v1/generate",
                json={
                    "prompt": "a very private prompt",
                    "num_inference_steps": 2,
                    "num_images": 2,
                    "seed": 1,
                },
                headers={"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"},
                timeout=120,
            )
            answer.raise_for_status()
            metrics = _scraped()
            spans = receiver.wait(
                lambda spans: (
                    {str(span.attributes.get("deployment")) for span in spans} >= _DEPLOYMENTS
                    and {span.name for span in spans} >= _SPANS
                )
            )
    print(
        json.dumps(
            {
                "spans": [asdict(span) for span in spans],
                "metrics": metrics,
                "id": answer.json()["id"],
            }
        )
    )


def _scraped() -> list[str]:
    """Return the samples of Kelvin's own metrics, as Prometheus would read them."""
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 90
    while True:
        text = httpx.get(url).text
        if all(sample in text for sample in _SAMPLES):
            return [line for line in text.splitlines() if line.startswith("ray_kelvin_")]
        assert time.monotonic() < deadline, "no metrics"
        time.sleep(0.5)


if __name__ == "__main__":
    main(*sys.argv[1:])
