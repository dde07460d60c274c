"""One trace a request, from the caller's own through every stage; and Prometheus metrics."""

import json
import re
import secrets
import subprocess
import sys
from typing import Any

import pytest


@pytest.fixture(scope="module")
def trace_id() -> str:
    return secrets.token_hex(16)


@pytest.fixture(scope="module")
def seen(tmp_path_factory, trace_id) -> Any:
    folder = tmp_path_factory.mktemp("traced")
    done = subprocess.run(
        [sys.executable, "-m", "tests.processes.traced_run", str(folder), trace_id],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=280,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_the_callers_trace_reaches_every_stage(seen, trace_id):
    spans = {span["span_id"]: span for span in seen["spans"] if span["trace_id"] == trace_id}
    assert {span["service"] for span in spans.values()} == {"traced"}

    def ancestors(span: dict[str, Any]) -> list[str]:
        names = []
        while (parent := spans.get(span["parent_id"])) is not None:
            names.append(parent["name"])
            span = parent
        return names

    for deployment, stage in (
        ("text-encoder", "kelvin.text"),
        ("denoiser", "kelvin.denoise"),
        ("vae-decoder", "kelvin.decode"),
    ):
        routed = [
            span
            for span in spans.values()
            if span["name"].startswith(f"route_to_replica {deployment}")
        ]
        assert routed
        for span in routed:
            assert stage in ancestors(span)
            assert "generate_content kelvin-pico" in ancestors(span)


def test_one_generate_span_with_the_conventions_names(seen, trace_id):
    [span] = [span for span in seen["spans"] if span["name"].startswith("generate_content")]
    assert span["trace_id"] == trace_id
    assert span["attributes"]["gen_ai.response.id"] == seen["id"]
    assert span["attributes"]["gen_ai.request.choice.count"] == 2
    assert span["attributes"]["kelvin.num_inference_steps"] == 2


def test_no_prompt_in_any_span(seen):
    assert not [span["name"] for span in seen["spans"] if "private" in span["raw"]]


def test_metrics(seen):
    totals: dict[tuple[str, str | None], float] = {}
    for line in seen["metrics"]:
        name, rest = line.split("{", 1)
        labels, value = rest.rsplit("} ", 1)
        shown = re.search(r'(?:stage|status)="(\w+)"', labels)
        key = (name, shown.group(1) if shown else None)
        totals[key] = totals.get(key, 0) + float(value)
    assert totals["ray_kelvin_images_total", None] == 2
    assert totals["ray_kelvin_jobs_total", "succeeded"] == 1
    for stage in ("text", "denoise", "decode", "store"):
        assert totals["ray_kelvin_stage_seconds_count", stage] >= 1
