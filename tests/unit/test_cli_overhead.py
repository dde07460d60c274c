"""The overhead measurement's arithmetic: its parts are all of the time and nothing twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.overhead import LONGEST_MEDIAN_S, Timing, report_of, timing_of
from serve.requests import GenerateRequest, GenerateResult, StageReport

SECONDS = st.floats(0.0, 10.0)


def result(seconds: float, **stages: tuple[float, float]) -> GenerateResult:
    return GenerateResult(
        id="0",
        model="pico",
        request=GenerateRequest(prompt="x"),
        images=(),
        stages=tuple(
            StageReport.model_validate(
                {"stage": stage, "replica": "r", "pid": 1, "precision": "fp32"}
                | {"queue_s": queue_s, "seconds": work_s}
            )
            for stage, (work_s, queue_s) in stages.items()
        ),
        seconds=seconds,
    )


@given(*[SECONDS] * 7)
def test_the_parts_of_the_overhead_are_the_overhead(
    text: float,
    denoise: float,
    decode: float,
    store: float,
    queue: float,
    fetch: float,
    total: float,
) -> None:
    timing = timing_of(
        result(
            total / 2,
            text=(text, 0),
            denoise=(denoise, queue),
            decode=(decode, 0),
            store=(store, 0),
        ),
        total,
        fetch,
    )
    parts = timing.store_s + timing.queue_s + timing.hops_s + timing.front_door_s + timing.fetch_s
    assert parts == pytest.approx(timing.overhead_s, abs=1e-6)
    assert timing.model_s + timing.overhead_s == pytest.approx(timing.total_s, abs=1e-6)


@pytest.mark.parametrize(("total_s", "met"), [(LONGEST_MEDIAN_S - 1, True), (5.0, False)])
def test_a_missed_target_is_said(total_s: float, met: bool) -> None:
    timing = Timing(total_s, 0.1, total_s - 0.3, 0.1, 0.01, 0.0, 0.01, total_s - 0.02)
    report = report_of([timing] * 3, "pico")
    assert report["targets"]["total_s"]["met"] is met
    assert report["targets"]["overhead_s"]["met"] is True
    assert report["median"]["total_s"] == total_s
