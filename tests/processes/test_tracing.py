"""One trace a request, from its client's own span to the upload; metrics and logs beside it.

All of one run of a real Kelvin, which sends to a collector and is scraped as by Prometheus.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from cluster.pool_gauges import POOL_METRICS
from loadtest.otlp_receiver import ReceivedSpan
from serve.metric_table import METRICS
from tests.monitoring_files import metric_names
from tests.trace_shape import covered, tree

_KNOWN = {**METRICS, **POOL_METRICS}


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("traced")
    done = subprocess.run(
        [sys.executable, "-m", "tests.processes.traced_run", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=280,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def spans(seen) -> list[ReceivedSpan]:
    """Those of one caller's trace: of several that with the least time between its spans.

    Where other processes take the cores, the time in which none of ours ran is in no span.
    """
    every = [ReceivedSpan(**span) for span in seen["spans"]]
    traces = [[span for span in every if span.trace_id == trace_id] for trace_id in seen["ids"]]
    return max(traces, key=lambda spans: covered(_parts(spans), tree(spans)[0]))


def _parts(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
    """Return all but the spans that go round the whole, which would prove nothing."""
    root, _ = tree(spans)
    return [
        span for span in spans if span is not root and not span.name.startswith("generate_content")
    ]


def test_one_tree_from_client_to_upload(spans):
    root, _ = tree(spans)
    assert root.name == "client"
    assert {span.service for span in spans if span is not root} == {"traced"}
    counted = Counter(span.name for span in spans)
    expected = {
        "kelvin.journal.accept": 1,
        "generate_content kelvin-pico": 1,
        "kelvin.text.replica": 1,
        "kelvin.denoise.replica": 2,
        "kelvin.decode.replica": 2,
        "kelvin.share": 2,
        "kelvin.picture": 2,
        "kelvin.spool": 2,
        "kelvin.store": 2,
        "kelvin.presign": 2,
        "kelvin.journal.publish": 1,
    }
    assert {name: counted[name] for name in expected} == expected
    # Few, though two pictures take 28 steps each: one a company of pictures.
    assert 1 <= counted["kelvin.denoise.batch"] <= 4
    assert covered(_parts(spans), root) >= 0.95


def test_the_callers_trace_reaches_every_stage(spans):
    by_id = {span.span_id: span for span in spans}

    def ancestors(span: ReceivedSpan) -> list[str]:
        names = []
        while (parent := by_id.get(span.parent_id)) is not None:
            names.append(parent.name)
            span = parent
        return names

    for stage in ("text", "denoise", "decode"):
        done = [span for span in spans if span.name == f"kelvin.{stage}.replica"]
        assert done
        for span in done:
            above = [f"kelvin.{stage}", "generate_content kelvin-pico"]
            assert ancestors(span) == [*above, "POST /v1/jobs", "kelvin.proxy", "client"]


def test_a_caller_that_does_not_trace_has_one_trace_too(seen):
    every = [ReceivedSpan(**span) for span in seen["spans"]]
    traces = {span.trace_id for span in every if span.name == "generate_content kelvin-pico"}
    [own] = traces - set(seen["ids"]) - {_trace_by_handle(seen)}
    root, _ = tree([span for span in every if span.trace_id == own])
    assert root.name == "kelvin.proxy"
    assert root.attributes["http.response.status_code"] == 202


def _trace_by_handle(seen) -> str:
    [trace_id] = {
        str(span["trace_id"])
        for span in seen["spans"]
        if span["attributes"].get("gen_ai.response.id") == seen["by_handle"]
    }
    return trace_id


def test_a_request_by_handle_has_one_trace_too(seen):
    every = [ReceivedSpan(**span) for span in seen["spans"]]
    own = [span for span in every if span.trace_id == _trace_by_handle(seen)]
    root, _ = tree(own)
    assert root.name == "kelvin.handle"
    assert {span.name for span in own} >= {"kelvin.journal.accept", "kelvin.decode.replica"}


def test_nothing_is_traced_that_nobody_asked_for(seen):
    """What replicas ask each other is no request of anybody's."""
    every = [ReceivedSpan(**span) for span in seen["spans"]]
    roots = {tree_root.name for tree_root in every if not tree_root.parent_id}
    assert roots == {"client", "kelvin.proxy", "kelvin.handle"}


def test_batches_and_requests_are_linked(spans):
    denoised = {span.span_id for span in spans if span.name == "kelvin.denoise.replica"}
    batches = [span for span in spans if span.name == "kelvin.denoise.batch"]
    steps: Counter[str] = Counter()
    for batch in batches:
        assert batch.parent_id in denoised
        for span_id, part in batch.links:
            steps[span_id] += part["kelvin.steps"]
    assert steps == dict.fromkeys(denoised, 28)


def test_one_generate_span_with_the_conventions_names(seen, spans):
    [span] = [span for span in spans if span.name.startswith("generate_content")]
    assert span.attributes["gen_ai.response.id"] == seen["ids"][span.trace_id]
    assert span.attributes["gen_ai.request.choice.count"] == 2
    assert span.attributes["kelvin.num_inference_steps"] == 28


def test_no_prompt_in_any_span(seen):
    assert not [span["name"] for span in seen["spans"] if "private prompt" in span["raw"]]


def test_metrics(seen):
    totals: dict[tuple[str, str | None], float] = {}
    for line in seen["metrics"]:
        name, rest = line.split("{", 1)
        labels, value = rest.rsplit("} ", 1)
        shown = re.search(r'(?:stage|status)="(\w+)"', labels)
        key = (name, shown.group(1) if shown else None)
        totals[key] = totals.get(key, 0) + float(value)
    jobs = 2 + len(seen["ids"])  # the first, and that by handle, are not traced by their callers
    assert totals["ray_kelvin_images_total", None] == 2 * jobs
    assert totals["ray_kelvin_jobs_total", "succeeded"] == jobs
    for stage in ("text", "denoise", "decode", "store"):
        assert totals["ray_kelvin_stage_seconds_count", stage] >= 1
    for stage in ("text", "denoise", "decode", "share"):
        assert totals["ray_kelvin_queue_seconds_count", stage] >= 1
    # Pictures share forwards, and the second request's may not have been reported yet.
    assert totals["ray_kelvin_step_seconds_count", None] >= 28
    assert totals["ray_kelvin_journal_lease_held", None] == 1


def test_what_is_scraped_is_what_the_tables_say(seen):
    exported = {_base(name) for name in seen["names"] if name.startswith("ray_kelvin_")}
    assert exported <= {f"ray_{name}" for name in _KNOWN}
    assert exported >= {f"ray_{name}" for name, spec in _KNOWN.items() if not spec.is_rare}


def test_dashboard_and_alerts_name_only_what_is_exported(seen):
    rare = {f"ray_{name}" for name, spec in _KNOWN.items() if spec.is_rare}
    named = metric_names()
    assert len(named) > 20
    assert named - set(seen["names"]) <= rare


def test_metrics_by_otlp(seen):
    received = {metric["name"]: metric for metric in seen["otlp"]}
    assert received["kelvin.images"]["kind"] == "sum"
    assert received["kelvin.images"]["service"] == "traced"
    assert received["kelvin.images"]["unit"] == "{image}"
    known = {spec.otel_name: spec.unit for spec in _KNOWN.values()}
    assert all(known[name] == metric["unit"] for name, metric in received.items())


def test_logs_are_json_with_the_trace(seen):
    of_traces = [line for line in seen["logged"] if line.get("trace_id") in seen["ids"]]
    told_by = {line["deployment"] for line in of_traces}
    assert told_by >= {
        "kelvin_pipeline",
        "kelvin_text-encoder",
        "kelvin_denoiser",
        "kelvin_vae-decoder",
    }
    assert not [line for line in seen["logged"] if "very private" in json.dumps(line)]


def _base(name: str) -> str:
    for suffix in ("_bucket", "_count", "_sum"):
        if (bare := name.removesuffix(suffix)) != name:
            return bare
    return name
