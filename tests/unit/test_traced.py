"""A proxy's span: below the client's, above the front door's, and silent about what was asked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serve.http.traced import Traced
from serve.keys import new_key

_CLIENT = f"00-{1:032x}-{2:016x}-01"


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    sent = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(sent))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return sent


def _asked(path: str, *headers: tuple[bytes, bytes], status: int = 202) -> list[bytes]:
    """Send a request through a proxy to a front door; return its `traceparent` as seen between."""
    seen: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def between(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(value for name, value in scope["headers"] if name.lower() == b"traceparent")
        assert (b"host", b"kelvin") in scope["headers"]
        await Traced(app)(scope, receive, send)

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        pass

    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path}
    scope["headers"] = [(b"host", b"kelvin"), *headers]
    asyncio.run(Traced(between, is_proxy=True)(scope, receive, send))
    return seen


async def _nothing(*_: Any) -> Any:
    return {}


def _spans(kept: InMemorySpanExporter) -> tuple[ReadableSpan, ReadableSpan]:
    door, proxy = kept.get_finished_spans()
    assert proxy.name == "kelvin.proxy"
    assert door.name == "POST"
    assert door.parent is not None
    assert proxy.context is not None
    assert door.parent.span_id == proxy.context.span_id
    assert door.parent.trace_id == proxy.context.trace_id
    return door, proxy


def test_the_clients_trace_goes_on_below_the_proxys_span(kept: InMemorySpanExporter) -> None:
    [between] = _asked("/v1/jobs", (b"TraceParent", _CLIENT.encode()))
    _, proxy = _spans(kept)
    assert proxy.parent is not None
    assert proxy.parent.trace_id == 1
    assert proxy.parent.span_id == 2
    assert between.startswith(f"00-{1:032x}-".encode())
    assert between != _CLIENT.encode()


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ((b"traceparent", b"\xff\xfe"),),
        ((b"traceparent", b"00-0-0-01"),),
        ((b"traceparent", _CLIENT.encode()), (b"traceparent", _CLIENT.encode())),
    ],
)
def test_where_no_client_traces_or_nobody_can_read_it_the_proxy_begins_a_trace(
    kept: InMemorySpanExporter, headers: tuple[tuple[bytes, bytes], ...]
) -> None:
    [_] = _asked("/v1/jobs", *headers)
    _, proxy = _spans(kept)
    assert proxy.parent is None


def test_what_a_client_does_not_sample_nobody_does(kept: InMemorySpanExporter) -> None:
    [between] = _asked("/v1/jobs", (b"traceparent", _CLIENT[:-2].encode() + b"00"))
    assert not kept.get_finished_spans()
    assert between.endswith(b"-00")


def test_a_key_in_a_path_is_in_no_span_and_errors_are_marked(kept: InMemorySpanExporter) -> None:
    key, _ = new_key("tenant", ("generate",))
    _asked(f"/k/{key}/v1/jobs", status=503)
    for span in _spans(kept):
        assert key not in span.to_json()
        assert span.attributes is not None
        assert span.attributes["error.type"] == "503"
        assert not span.status.is_ok


def test_without_telemetry_headers_are_as_they_came() -> None:
    assert _asked("/v1/jobs", (b"traceparent", _CLIENT.encode())) == [_CLIENT.encode()]
    assert _asked("/v1/jobs") == []


@pytest.mark.parametrize("path", ["/", "/healthz", "/v1/status", "/-/healthz", "/-/routes"])
@pytest.mark.parametrize("before", ["", "/k/kelvin_0123456789"])
def test_probes_and_pages_have_no_span(kept: InMemorySpanExporter, before: str, path: str) -> None:
    _asked(before + path)
    assert not kept.get_finished_spans()


def test_what_vendors_add_goes_with_the_traceparent_it_belongs_to(
    kept: InMemorySpanExporter,
) -> None:
    states: list[bytes] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        states.extend(value for name, value in scope["headers"] if name == b"tracestate")

    headers = [(b"traceparent", _CLIENT.encode()), (b"tracestate", b"vendor=1")]
    scope = {"type": "http", "method": "GET", "path": "/v1/jobs", "headers": headers}
    asyncio.run(Traced(behind, is_proxy=True)(scope, _nothing, _nothing))
    assert states == []
