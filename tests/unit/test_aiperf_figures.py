"""What is made of aiperf's report: only a whole and faultless profile passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loadtest.aiperf_tool import ToolFailed, faults, figures, installed, profile

REPORT = {
    "aiperf_version": "0.13.0",
    "request_throughput": {"unit": "requests/sec", "avg": 4.144},
    "request_latency": {"unit": "ms", "avg": 461.7, "p50": 375.3, "p90": 680.6, "p99": 1601.2}
    | {"max": 1602.6},
    "request_count": {"unit": "requests", "avg": 34.0},
    "benchmark_duration": {"unit": "sec", "avg": 60.18},
    "total_isl": {"unit": "tokens", "avg": 170.0},
    "total_usage_prompt_tokens": {"unit": "tokens", "avg": 204.0},
    "error_summary": [],
    "was_cancelled": False,
    "is_complete": True,
    "exit_code": 0,
}
ERROR = {"error_details": {"code": 500, "message": "Internal Server Error"}, "count": 2}


def test_the_figures_of_a_report():
    found = figures(REPORT)
    assert found["requests"] == 34
    assert found["latency_s"] == {"p50": 0.375, "p90": 0.681, "p99": 1.601, "max": 1.603}
    assert found["prompt_tokens"] == {"by_aiperf": 170, "by_kelvin": 204}
    assert faults(found, 60.0, stored=34) == []


@pytest.mark.parametrize(
    ("change", "stored", "told"),
    [
        ({"error_request_count": {"avg": 2.0}, "error_summary": [ERROR]}, 34, "2 requests failed"),
        ({"error_summary": [ERROR]}, 34, "Internal Server Error"),
        ({"request_count": None}, 0, "no request succeeded"),
        ({}, 33, "stored 33 pictures"),
        ({"benchmark_duration": {"avg": 12.0}}, 34, "ended after 12.0 s"),
        ({"was_cancelled": True}, 34, "cut short"),
        ({"is_complete": False}, 34, "cut short"),
        ({"exit_code": 3}, 34, "exit code 3"),
    ],
)
def test_what_is_wrong_is_told(change, stored, told):
    found = faults(figures(REPORT | change), 60.0, stored=stored)
    assert len(found) == 1
    assert told in found[0]


def test_what_cannot_be_installed_says_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ToolFailed, match="venv") as failed, capfd.disabled():
        installed(None)
    assert "python3-venv" in str(failed.value.allowed)
    assert str(tmp_path / "file") in str(failed.value.allowed)


def test_a_tool_that_cannot_be_run_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    gone = tmp_path / "aiperf"
    asked: dict[str, Any] = {"seconds": 1.0, "concurrency": 1, "streaming": False, "body": {}}
    with pytest.raises(ToolFailed, match="No such file") as failed, capfd.disabled():
        profile(gone, "http://127.0.0.1:1", "pico", tmp_path, ["a"], tmp_path, **asked)
    assert failed.value.value == str(gone)
