"""The collector of telemetry's cost: reads at the end alone, and notices what should not be."""

import gzip

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from loadtest.otlp_sink import METRICS, TRACES
from loadtest.telemetry_collector import Collector


def message(*names: str) -> bytes:
    asked = ExportTraceServiceRequest()
    spans = asked.resource_spans.add().scope_spans.add().spans
    for name in names:
        spans.add(name=name)
    body: bytes = asked.SerializeToString()
    return body


def test_pictures_are_counted_by_their_own_span() -> None:
    sink = Collector()
    sink.take(TRACES, message("generate_content pico", "kelvin.text"), None)
    sink.take(METRICS, b"not looked into", None)
    sink.take(TRACES, gzip.compress(message("generate_content pico")), "gzip")
    told = sink.wait_for(2)
    assert told["messages"] == 3
    assert told["spans"] == 3
    assert told["bytes"] > len(b"not looked into")


def test_a_picture_that_should_not_have_been_traced_is_an_error() -> None:
    sink = Collector()
    sink.take(TRACES, message("generate_content pico", "generate_content pico"), None)
    with pytest.raises(RuntimeError, match="2 pictures were traced, not 1"):
        sink.wait_for(1)
