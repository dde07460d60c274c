"""Kelvin's own spans say what the SDK's would say of the same work."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from serve import span_block
from serve.lean_span import LeanSpan, LeanTracer

VALUES = st.one_of(st.text(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats())
KEYS = st.text(min_size=1)
ATTRIBUTES = st.dictionaries(KEYS, VALUES, max_size=4)
OTHER = SpanContext(7, 8, is_remote=True, trace_flags=TraceFlags(1))
CHANGES: st.SearchStrategy[Callable[[Span], None]] = st.one_of(
    st.builds(lambda key, value: lambda span: span.set_attribute(key, value), KEYS, VALUES),
    st.builds(lambda values: lambda span: span.set_attributes(values), ATTRIBUTES),
    st.builds(lambda name: lambda span: span.update_name(name), st.text()),
    st.builds(lambda about: lambda span: span.add_link(OTHER, about), ATTRIBUTES),
    st.builds(lambda about: lambda span: span.add_event("it", about, 5), ATTRIBUTES),
    st.just(lambda span: span.set_status(Status(StatusCode.ERROR))),
    st.just(lambda span: span.set_status(StatusCode.ERROR, "why")),
    st.just(lambda span: span.end(99)),
)


@pytest.fixture(scope="module")
def kept() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def provider(kept: InMemorySpanExporter) -> TracerProvider:
    made = TracerProvider(shutdown_on_exit=False)
    made.add_span_processor(SimpleSpanProcessor(kept))
    return made


def below(flags: int = 1, trace_id: int = 1) -> Context:
    parent = SpanContext(trace_id, 2, is_remote=True, trace_flags=TraceFlags(flags))
    return trace.set_span_in_context(trace.NonRecordingSpan(parent), Context())


def told(span: ReadableSpan) -> str:
    """What is sent of a span, but for its own id and the order of attributes."""
    found: dict[str, Any] = json.loads(span.to_json())
    assert found["context"].pop("span_id") != "0x0000000000000000"
    return json.dumps(found, sort_keys=True)


@given(st.text(), st.sampled_from(SpanKind), ATTRIBUTES, st.lists(CHANGES, max_size=6))
def test_it_is_the_span_that_the_sdk_would_have_sent(
    kept: InMemorySpanExporter,
    provider: TracerProvider,
    name: str,
    kind: SpanKind,
    attributes: dict[str, Any],
    changes: list[Callable[[Span], None]],
) -> None:
    kept.clear()
    for tracer in (
        provider.get_tracer("kelvin"),
        LeanTracer(provider, provider.get_tracer("kelvin"), "kelvin"),
    ):
        links = [trace.Link(OTHER, {"a": 1})]
        span = tracer.start_span(name, below(), kind, attributes, links, 3)
        for change in changes:
            change(span)
        span.end(100)
        assert not span.is_recording()
    sdk, lean = kept.get_finished_spans()
    assert told(lean) == told(sdk)
    assert lean.instrumentation_scope == sdk.instrumentation_scope


def test_its_ids_are_below_its_parents(
    kept: InMemorySpanExporter, provider: TracerProvider
) -> None:
    kept.clear()
    tracer = LeanTracer(provider, provider.get_tracer("kelvin"), "kelvin")
    span = tracer.start_span("one", below(trace_id=9))
    assert isinstance(span, LeanSpan)
    with trace.use_span(span):
        child = tracer.start_span("two")
    child.end()
    assert child.get_span_context().trace_id == 9
    assert child.get_span_context().span_id != span.get_span_context().span_id
    [sent] = kept.get_finished_spans()
    assert sent.parent == span.get_span_context()


def test_where_nothing_is_above_the_sampler_decides(kept: InMemorySpanExporter) -> None:
    none = TracerProvider(sampler=ParentBased(ALWAYS_OFF), shutdown_on_exit=False)
    none.add_span_processor(SimpleSpanProcessor(kept))
    root = LeanTracer(none, none.get_tracer("kelvin"), "kelvin").start_span("root", Context())
    assert not root.is_recording()
    assert root.get_span_context().is_valid


def test_below_what_is_not_sampled_nothing_is_and_that_is_passed_on(
    kept: InMemorySpanExporter, provider: TracerProvider
) -> None:
    kept.clear()
    span = LeanTracer(provider, provider.get_tracer("kelvin"), "kelvin").start_span(
        "one", below(flags=0)
    )
    span.end()
    assert not span.is_recording()
    assert span.get_span_context().trace_id == 1
    assert not span.get_span_context().trace_flags.sampled
    assert not kept.get_finished_spans()


def test_an_error_is_told_by_its_class_alone(
    kept: InMemorySpanExporter, provider: TracerProvider
) -> None:
    kept.clear()
    span = LeanTracer(provider, provider.get_tracer("kelvin"), "kelvin").start_span("one", below())
    span.record_exception(ValueError("a very private prompt"))
    span.end()
    [sent] = kept.get_finished_spans()
    [event] = sent.events
    assert (event.name, dict(event.attributes or {})) == (
        "exception",
        {"exception.type": "ValueError"},
    )


def _kelvins(provider: TracerProvider, patch: pytest.MonkeyPatch) -> object:
    patch.setattr(trace, "get_tracer_provider", lambda: provider)
    return span_block.tracer()


def test_an_sdk_that_hides_its_processors_makes_the_spans_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    assert isinstance(_kelvins(provider, monkeypatch), LeanTracer)
    other = TracerProvider(shutdown_on_exit=False)
    own = other.get_tracer("kelvin")
    del other._active_span_processor
    assert _kelvins(other, monkeypatch) is own


def test_an_sdk_that_is_switched_off_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    provider = TracerProvider(shutdown_on_exit=False)
    assert isinstance(_kelvins(provider, monkeypatch), trace.NoOpTracer)
