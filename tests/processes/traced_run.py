"""One traced request through a Kelvin of its own; prints what a collector and a scraper saw.

A process of its own, because a process has one Ray, and Ray Serve reads its tracing settings once.
"""

import json
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import ray
import yaml
from opentelemetry.sdk.trace import TracerProvider
from ray import serve

from cluster.pool_gauges import POOL_METRICS
from loadtest.otlp_receiver import ReceivedSpan, otlp_receiver
from serve import span_sender
from serve.client import Kelvin
from serve.config import load_settings
from serve.local import LocalKelvin
from serve.metric_table import METRICS
from serve.requests import GenerateRequest

_REQUEST = GenerateRequest(
    prompt="a very private prompt", num_inference_steps=28, num_images=2, seed=1
)
_TRACED = 3  # requests, of which the test takes the one that a busy machine disturbed least
_PICTURES = 2 * (2 + _TRACED)
_SPANS = {
    "client",
    "generate_content kelvin-pico",
    "kelvin.text.replica",
    "kelvin.denoise.replica",
    "kelvin.decode.replica",
    "kelvin.store",
    "kelvin.journal.publish",
}
_DOOR = "kelvin.proxy"
_STAGES = ("text", "denoise", "decode", "store")
_CARD = {"temperature_c": 60, "limit_c": 85, "power_w": 300, "clocks_event_reasons": 4}
_ALL = {**METRICS, **POOL_METRICS}
_SCRAPED = (
    *(f"ray_{spec.name}" for spec in _ALL.values() if not spec.is_rare),
    *(f'stage="{stage}"' for stage in _STAGES),
)


def main(data_dir: str) -> None:
    """Make two pictures several times; print spans of all but the first, metrics and logs."""
    script = Path(data_dir, "heat.yaml")
    script.write_text(yaml.safe_dump({"default": _CARD}))
    with otlp_receiver() as receiver:

        def pool(name: str, **more: Any) -> list[dict[str, Any]]:
            return [{"name": name, "torch_threads": 1, **more}]

        settings = load_settings(
            overrides={
                "model": {"path": "pico"},
                "text_encoder": pool("text-encoder"),
                # Planned, and so told of in metrics, but with no room to grow.
                "denoiser": pool("denoiser", min_replicas=1, max_replicas=1),
                "vae_decoder": pool("vae-decoder"),
                "http": {"port": 0},
                "embedded_store": {"data_dir": str(Path(data_dir, "store"))},
                "thermal": {"source": "scripted", "script": str(script), "period_s": 0.2},
                "telemetry": {
                    "otlp_endpoint": receiver.endpoint,
                    "service_name": "traced",
                    "log_format": "json",
                },
            }
        )
        with LocalKelvin(settings) as kelvin, Kelvin(kelvin.url) as client:
            client.generate(_REQUEST)  # what comes first loads and allocates
            by_handle = serve.get_app_handle("kelvin").generate.remote(_REQUEST).result()
            provider = TracerProvider()
            for processor in span_sender.span_processors():
                provider.add_span_processor(processor)
            ids: dict[str, str] = {}
            for seed in range(_TRACED):
                with provider.get_tracer("caller").start_as_current_span("client") as span:
                    result = client.generate(_REQUEST.model_copy(update={"seed": seed}))
                ids[f"{span.get_span_context().trace_id:032x}"] = result.id
            provider.shutdown()
            names, metrics = _scraped()
            spans = receiver.wait(
                lambda spans: (
                    all(
                        {span.name for span in spans if span.trace_id == trace_id} >= _SPANS
                        for trace_id in ids
                    )
                    and sum(_is_door(span) for span in spans) == 1 + _TRACED
                    and any(span.name == "kelvin.handle" for span in spans)
                )
            )
            received = receiver.wait_for_metric("kelvin.images")
            logged = _logged()
    print(
        json.dumps(
            {
                "ids": ids,
                "by_handle": by_handle.id,
                "spans": [asdict(span) for span in spans],
                "names": names,
                "metrics": metrics,
                "otlp": [asdict(metric) for metric in received],
                "logged": logged,
            }
        )
    )


def _is_door(span: ReceivedSpan) -> bool:
    return span.name == _DOOR and span.attributes["http.request.method"] == "POST"


def _scraped() -> tuple[list[str], list[str]]:
    """Return the names of all samples, and those samples that are Kelvin's own."""
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 90
    while True:
        text = httpx.get(url).text
        missing = [sample for sample in _SCRAPED if sample not in text]
        pictures = re.findall(r"^ray_kelvin_images_total\{.*\} (\S+)$", text, re.MULTILINE)
        if sum(map(float, pictures)) < _PICTURES:
            missing.append(f"{_PICTURES} pictures")
        if not missing:
            lines = [line for line in text.splitlines() if not line.startswith("#")]
            names = sorted({re.split(r"[{ ]", line, maxsplit=1)[0] for line in lines})
            return names, [line for line in lines if line.startswith("ray_kelvin_")]
        assert time.monotonic() < deadline, f"no metrics: {missing}"
        time.sleep(0.5)


def _logged() -> list[dict[str, Any]]:
    """Return the lines of the replicas' logs."""
    session = ray._private.worker._global_node.get_logs_dir_path()
    return [
        json.loads(line)
        for file in Path(session, "serve").glob("replica_*.log")
        for line in file.read_text().splitlines()
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
