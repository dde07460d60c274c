"""Traces as a collector receives them; nothing at all when tracing is off."""

import asyncio
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pytest
from pydantic import ValidationError

from cluster.heat_reading import Reading
from cluster.pool_state import ReplicaState
from loadtest.otlp_receiver import OtlpReceiver, otlp_receiver
from serve import recorders, span_sender, telemetry
from serve.config import Settings, TelemetrySettings
from serve.errors import StorageUnavailable
from serve.otlp_complaints import quieten
from serve.requests import GenerateRequest

_REQUEST = GenerateRequest(
    prompt="a very private prompt",
    negative_prompt="another private one",
    model="builtin",
    width=256,
    height=128,
    num_inference_steps=20,
    guidance_scale=4.5,
    sampler="euler",
    scheduler="normal",
    seed=2**64 - 1,
    num_images=2,
)


@pytest.fixture
def receiver():
    with otlp_receiver() as running:
        yield running


@pytest.fixture
def traced(receiver, monkeypatch):
    """This process traces into the receiver, set up as Ray Serve does it in its own."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    for name, value in telemetry.environment(_settings(receiver)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    provider = TracerProvider()
    for processor in span_sender.span_processors():
        provider.add_span_processor(processor)
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    yield receiver
    provider.shutdown()


def _settings(receiver: OtlpReceiver) -> Settings:
    return Settings(
        telemetry=TelemetrySettings(otlp_endpoint=receiver.endpoint, service_name="kelvin-test")
    )


def test_off_by_default():
    assert telemetry.environment(Settings()) == {}
    span_sender.trace_this_process({})
    with telemetry.generate_span("id", _REQUEST) as span, telemetry.span("kelvin.text") as child:
        assert not span.is_recording()
        assert not child.is_recording()


def test_json_logs_need_no_endpoint():
    settings = Settings(telemetry=TelemetrySettings(log_format="json"))
    assert telemetry.environment(settings) == {"RAY_SERVE_LOG_ENCODING": "JSON"}


def test_a_node_whose_ray_was_started_without_the_variables_says_so(monkeypatch, caplog):
    told = TelemetrySettings(otlp_endpoint="http://collector:4318", log_format="json")
    settings = Settings(telemetry=told)
    environment = telemetry.environment(settings)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING, "ray.serve"):
        telemetry.warn_of_what_is_not_set(settings)
        telemetry.warn_of_what_is_not_set(Settings())
        assert not caplog.messages
        monkeypatch.delenv("OTEL_TRACES_SAMPLER")
        monkeypatch.setenv(recorders.OTLP_ENDPOINT, "http://another:4318")
        telemetry.warn_of_what_is_not_set(settings)
    (said,) = caplog.messages
    assert "OTEL_TRACES_SAMPLER" in said
    assert recorders.OTLP_ENDPOINT in said
    assert "OTEL_SERVICE_NAME" not in said
    assert "collector" not in said


@pytest.mark.parametrize("endpoint", ["localhost:4318", "grpc://a:4317", "http://a/?x=1", ""])
def test_an_endpoint_that_is_none_is_refused_at_start(endpoint):
    with pytest.raises(ValidationError, match="otlp_endpoint"):
        TelemetrySettings(otlp_endpoint=endpoint)


def test_an_endpoint_has_a_path_or_none():
    for endpoint in ("http://127.0.0.1:4318", "https://collector/otlp/"):
        settings = Settings(telemetry=TelemetrySettings(otlp_endpoint=endpoint))
        assert telemetry.environment(settings)[recorders.OTLP_ENDPOINT] == endpoint.rstrip("/")


def test_off_costs_no_import_of_the_exporter():
    code = (
        "import sys\n"
        "from serve import telemetry\n"
        "with telemetry.span('kelvin.text', {'kelvin.image': 0}): pass\n"
        "telemetry.Metrics().images()\n"
        "names = ('ray', 'opentelemetry.sdk', 'opentelemetry.exporter')\n"
        "print([name for name in names if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_process_of_kelvins_sends_by_its_environment_alone(receiver):
    environment = telemetry.environment(_settings(receiver))
    code = (
        "from serve import span_sender, telemetry\n"
        "span_sender.trace_this_process({'service.instance.id': 'proxy-1'})\n"
        "span_sender.trace_this_process({'service.instance.id': 'proxy-1'})\n"
        "with telemetry.span('kelvin.text'): pass\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, check=True)
    [span] = receiver.wait(lambda spans: len(spans) == 1)
    assert span.name == "kelvin.text"
    assert span.service == "kelvin-test"


def test_a_share_of_requests_is_sampled_and_callers_decide_for_theirs(receiver):
    none = TelemetrySettings(otlp_endpoint=receiver.endpoint, sampling_ratio=0.0)
    environment = telemetry.environment(Settings(telemetry=none))
    code = (
        "from serve import span_sender, telemetry\n"
        "span_sender.trace_this_process({'service.instance.id': 'proxy-1'})\n"
        "with telemetry.span('kelvin.text'): pass\n"
        f"with telemetry.span('asked', parent='00-{1:032x}-{2:016x}-01'): pass\n"
        f"with telemetry.span('not', parent='00-{3:032x}-{4:016x}-00'): pass\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, check=True)
    [span] = receiver.wait(lambda spans: len(spans) == 1)
    assert (span.name, span.trace_id) == ("asked", f"{1:032x}")


def test_a_variable_of_opentelemetrys_that_is_wrong_stops_nothing(receiver):
    wrong = {"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "many"}
    environment = telemetry.environment(_settings(receiver)) | wrong
    code = (
        "from serve import span_sender, telemetry\n"
        "span_sender.trace_this_process({'service.instance.id': 'proxy-1'})\n"
        "with telemetry.span('kelvin.text'): pass\n"
    )
    environment = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True, check=True
    )
    assert "Spans cannot be sent." in done.stderr


def test_one_trace_a_request(traced):
    with telemetry.generate_span("0" * 32, _REQUEST):
        for stage in ("text", "denoise", "decode", "store"):
            with telemetry.span(f"kelvin.{stage}", {"kelvin.image": 0, "kelvin.none": None}):
                pass
    spans = {span.name: span for span in traced.wait(lambda spans: len(spans) == 5)}
    root = spans.pop("generate_content builtin")
    assert root.parent_id == ""
    assert root.attributes == {
        "gen_ai.operation.name": "generate_content",
        "gen_ai.provider.name": "kelvin",
        "gen_ai.output.type": "image",
        "gen_ai.request.model": "builtin",
        "gen_ai.request.seed": -1,  # 2**64 - 1 in the signed 64 bits that OTLP has
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.id": "0" * 32,
        "kelvin.job.id": "0" * 32,
        "kelvin.width": 256,
        "kelvin.height": 128,
        "kelvin.num_inference_steps": 20,
        "kelvin.guidance_scale": 4.5,
        "kelvin.sampler": "euler",
        "kelvin.scheduler": "normal",
        "kelvin.priority": 0,
        "kelvin.output_format": "png",
    }
    for span in spans.values():
        assert span.parent_id == root.span_id
        assert span.trace_id == root.trace_id
        assert span.attributes == {"kelvin.image": 0}


async def test_requests_at_the_same_time_do_not_mix(traced):
    async def one(number: int) -> None:
        with telemetry.generate_span(f"{number:032x}", _REQUEST):
            await asyncio.gather(*(stage(number) for _ in range(3)))

    async def stage(number: int) -> None:
        with telemetry.span("kelvin.denoise", {"kelvin.image": number}):
            await asyncio.sleep(0)

    await asyncio.gather(*(one(number) for number in range(8)))
    spans = traced.wait(lambda spans: len(spans) == 8 * 4)
    roots = {span.span_id: span for span in spans if not span.parent_id}
    assert len({root.trace_id for root in roots.values()}) == 8
    for span in spans:
        if span.parent_id:
            root = roots[span.parent_id]
            assert int(root.attributes["kelvin.job.id"], 16) == span.attributes["kelvin.image"]


def test_failure_is_marked_by_its_code_and_prompts_stay_private(traced):
    for error in (StorageUnavailable(_REQUEST.prompt), ValueError(_REQUEST.prompt)):
        with (
            pytest.raises(type(error)),
            telemetry.generate_span("0" * 32, _REQUEST),
            telemetry.span("kelvin.store"),
        ):
            raise error
    spans = traced.wait(lambda spans: len(spans) == 4)
    assert all(span.is_error for span in spans)
    assert [span.attributes["error.type"] for span in spans] == [
        "storage_unavailable",
        "storage_unavailable",
        "ValueError",
        "ValueError",
    ]
    assert not any("private" in span.raw for span in spans)


def test_collector_that_is_down_raises_nothing(monkeypatch):
    # A port that nobody listens on: sending fails in the exporter's own thread.
    from opentelemetry.sdk.trace import TracerProvider

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    provider = TracerProvider()
    [processor] = span_sender.span_processors()
    provider.add_span_processor(processor)
    with provider.get_tracer("x").start_as_current_span("y"):
        pass
    provider.shutdown()


def test_metrics_by_otlp(receiver, monkeypatch):
    seconds = [100.0]
    monkeypatch.setattr("serve.metrics.monotonic", lambda: seconds[0])
    monkeypatch.setenv("OTEL_SERVICE_NAME", "kelvin-test")
    monkeypatch.setenv(recorders.OTLP_ENDPOINT, receiver.endpoint)
    metrics, other = telemetry.Metrics(), telemetry.Metrics()
    metrics.queue_seconds("denoise", 0.3)
    other.queue_seconds("denoise", 0.4)  # what there are several of in a process is one sender's
    metrics.images(2)
    throttled = Reading(at=0.0, temperature_c=91.0, clocks_event_reasons=0x20)
    for seconds[0] in (100.0, 100.5, 103.0):  # once a second at most
        metrics.heat(ReplicaState("r"), throttled)
    recorders.otlp_recorder(receiver.endpoint).close()
    received = {metric.name: metric for metric in receiver.metrics}
    assert received["kelvin.queue"].value == 2
    assert received["kelvin.queue"].unit == "s"
    assert received["kelvin.queue"].attributes == {"stage": "denoise"}
    assert received["kelvin.images"].value == 2
    assert received["kelvin.images"].service == "kelvin-test"
    assert received["kelvin.gpu.temperature"].value == 91.0
    assert received["kelvin.gpu.temperature"].unit == "Cel"
    assert received["kelvin.gpu.throttle"].value == pytest.approx(3.0)


def test_of_a_gauge_the_last_value_is_sent_of_the_others_all(receiver, monkeypatch):
    monkeypatch.setattr("serve.otlp_recorder._MOST_WAITING", 100)
    monkeypatch.setenv(recorders.OTLP_ENDPOINT, receiver.endpoint)
    metrics = telemetry.Metrics()

    def recorded(stage: Literal["text", "decode"]) -> None:
        for number in range(1001):
            metrics.queue_seconds(stage, 0.1)
            metrics.queue_length(stage, number)

    with ThreadPoolExecutor() as threads:
        list(threads.map(recorded, ("text", "decode")))
    recorders.otlp_recorder(receiver.endpoint).close()
    received = {(each.name, each.attributes.get("stage")): each.value for each in receiver.metrics}
    for stage in ("text", "decode"):
        assert received["kelvin.queue", stage] == 1001
        assert received["kelvin.queue.length", stage] == 1000


def test_a_process_that_ends_sends_what_it_has_counted(receiver):
    code = "from serve.telemetry import Metrics; Metrics().images(2)"
    environment = os.environ | {recorders.OTLP_ENDPOINT: receiver.endpoint}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    assert [each.value for each in receiver.metrics if each.name == "kelvin.images"] == [2]


def test_a_collector_that_is_away_is_told_of_once(caplog):
    quieten()
    quieten()
    logger = logging.getLogger("opentelemetry.exporter.otlp.proto.http.metric_exporter")
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            logger.warning("away")
    assert len(caplog.records) <= 1


def test_metrics_do_nothing_outside_a_replica():
    metrics = telemetry.Metrics()
    metrics.stage_seconds("text", 0.1)
    metrics.queue_length("denoise", 3)
    metrics.images(2)
    metrics.job_ended("stored", 1.0)
    assert metrics._to.is_empty()
