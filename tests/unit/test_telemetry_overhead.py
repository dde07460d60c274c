"""The arithmetic of telemetry's cost: pairs are compared; what is slow for both costs nothing."""

import random

import pytest

from loadtest.telemetry_overhead import latency_report, throughput_report


def test_a_cost_is_found_in_noise_that_both_share() -> None:
    chance = random.Random(1)
    off = [chance.uniform(0.1, 0.3) for _ in range(200)]
    on = [seconds + 0.002 + chance.gauss(0, 0.001) for seconds in off]
    report = latency_report(off, on)
    assert report["cost_s"] == pytest.approx(0.002, abs=0.0003)
    low, high = report["cost_95_s"]
    assert low < 0.002 < high
    assert report["target"]["met"] is True
    assert latency_report(off, [seconds + 0.004 for seconds in off])["target"]["met"] is False


def test_what_noise_hides_is_not_decided() -> None:
    chance = random.Random(1)
    off = [chance.uniform(0.1, 0.3) for _ in range(200)]
    on = [chance.uniform(0.1, 0.3) for _ in off]
    assert latency_report(off, on)["target"]["met"] is None


def test_lost_throughput_is_a_share() -> None:
    report = throughput_report([10.0, 20.0, 10.0], [9.8, 19.6, 9.8])
    assert report["lost_share"] == pytest.approx(0.02)
    assert not report["target"]["met"]
    assert throughput_report([10.0], [10.0])["target"]["met"]
