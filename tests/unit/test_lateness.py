"""A load generator that lags is found out."""

from __future__ import annotations

import pytest

from loadtest import lateness


def test_a_server_that_answers_at_once_shows_what_the_generator_adds():
    found = lateness.measure(rate=60, seconds=0.5)
    assert found["failed"] == 0
    assert found["requests"] > 10
    assert 0 <= found["p50_ms"] <= found["p99_ms"] <= found["most_ms"]
    assert found["answer_p99_ms"] > 0


@pytest.mark.parametrize(("slow", "is_bottleneck"), [(1, False), (2, True)])
def test_one_in_a_hundred_may_be_late(slow: int, is_bottleneck: bool):
    late_s = [0.001] * (100 - slow) + [1.001 * lateness.MOST_P99_MS / 1000] * slow
    found = lateness.lateness_of(late_s)
    assert found["is_bottleneck"] is is_bottleneck
    assert found["requests"] == 100
    assert found["most_ms"] == pytest.approx(lateness.MOST_P99_MS, rel=0.01)


def test_without_requests_there_is_nothing_to_say():
    assert lateness.lateness_of([]) == {"requests": 0, "is_bottleneck": False}


def test_absurd_arguments_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        lateness.main(["--rate", "nan"])
    assert ended.value.code == 2
    assert "--rate" in capsys.readouterr().err


def test_a_report_says_so_where_the_generator_lagged():
    fine, late = lateness.lateness_of([0.001]), lateness.lateness_of([0.001, 0.25])
    assert lateness.bottleneck_note([fine, lateness.lateness_of([])]) is None
    note = lateness.bottleneck_note([fine, late])
    assert note is not None
    assert "250 ms" in note
