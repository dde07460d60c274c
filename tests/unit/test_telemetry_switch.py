"""The switch of a measured service: off there is nothing of it, and nothing is lost."""

from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from loadtest.telemetry_switch import Switch, SwitchedTracer, held_while_off, new_switch


def test_who_maps_the_same_file_sees_it_turned(tmp_path: Path) -> None:
    one = new_switch(tmp_path / "switch")
    other = Switch(tmp_path / "switch")
    assert one
    assert other
    one.turn(on=False)
    assert not other
    other.turn(on=True)
    assert one


def test_spans_are_made_only_while_it_is_on(tmp_path: Path) -> None:
    switch = new_switch(tmp_path / "switch")
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    tracer = SwitchedTracer(switch, provider.get_tracer("test"))
    with tracer.start_as_current_span("on"):
        tracer.start_span("beneath").end()
    switch.turn(on=False)
    span = tracer.start_span("off")
    assert not span.get_span_context().is_valid
    span.end()
    with tracer.start_as_current_span("off"):
        pass
    assert [each.name for each in kept.get_finished_spans()] == ["beneath", "on"]


def test_what_was_recorded_is_sent_when_it_is_on_again(tmp_path: Path) -> None:
    switch = new_switch(tmp_path / "switch")
    sent: list[list[Any]] = []

    def export(_: Any, spans: Any) -> SpanExportResult:
        sent.append(list(spans))
        return SpanExportResult.SUCCESS

    switched: Any = held_while_off(switch, export)
    switched(None, ["a"])
    switch.turn(on=False)
    assert switched(None, ["b"]) is SpanExportResult.SUCCESS
    assert switched(None, ["c"]) is SpanExportResult.SUCCESS
    assert sent == [["a"]]
    switch.turn(on=True)
    switched(None, ["d"])
    switched(None, ["e"])
    assert sent == [["a"], ["b", "c", "d"], ["e"]]
