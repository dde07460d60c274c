"""How telemetry's cost is measured: in turn, on one side only, and told with its verdict."""

import os
from pathlib import Path

import pytest

from loadtest.telemetry_figures import (
    Measured,
    latency_report,
    of_model_report,
    table_of,
    throughput_report,
)
from loadtest.telemetry_overhead import PICO, measure
from loadtest.telemetry_service import Service
from loadtest.telemetry_switch import new_switch


def measured(*pairs: tuple[float, float]) -> Measured:
    return Measured(list(pairs), list(pairs), ({"proxy": sum(p[0] for p in pairs)}, {"proxy": 1.0}))


@pytest.mark.parametrize("turn_on", [True, False])
def test_the_switch_is_turned_for_one_of_each_pair_and_both_come_first(
    tmp_path: Path, turn_on: bool
) -> None:
    switch = new_switch(tmp_path / "switch")
    service = Service("http://127.0.0.1:1", os.getpid(), switch, PICO)
    seen: list[bool] = []
    numbers: list[int] = []

    def work(number: int) -> None:
        seen.append(bool(switch))
        numbers.append(number)

    found = measure(service, work, 0.3, turn_on=turn_on)
    assert len(seen) == 2 * len(found.seconds) == 2 * len(found.cpu)
    assert numbers == list(range(len(seen)))
    expected = [False, turn_on, turn_on, False]
    assert seen == [expected[number % 4] for number in numbers]


def test_seconds_are_on_the_side_where_they_were_spent(tmp_path: Path) -> None:
    switch = new_switch(tmp_path / "switch")
    service = Service("http://127.0.0.1:1", os.getpid(), switch, PICO)
    spun = {False: 0, True: 0}

    def work(_: int) -> None:
        spun[bool(switch)] += 1
        for _ in range(300_000 if switch else 1):
            pass

    found = measure(service, work, 0.5, turn_on=True)
    assert spun[True] == spun[False]
    assert all(on > off for off, on in found.seconds)
    assert sum(found.by_process[1].values()) == pytest.approx(sum(on for _, on in found.cpu))


def test_latency_is_told_in_seconds_with_a_verdict() -> None:
    report = latency_report(measured(*[(0.1, 0.102), (0.1, 0.1022)] * 50))
    assert report["added_s"] == pytest.approx(0.0021)
    assert report["target"]["verdict"] == "met"
    assert report["cpu_s"]["added"] == pytest.approx(0.0021)
    slower = latency_report(measured(*[(0.1, 0.104), (0.1, 0.1042)] * 50))
    assert slower["target"]["verdict"] == "missed"
    unclear = latency_report(measured(*[(0.1, 0.09), (0.1, 0.114)] * 50 + [(0.1, 0.2)] * 9))
    assert unclear["target"]["verdict"] == "undecided"


def test_throughput_is_told_as_a_share_and_processor_time_a_picture() -> None:
    report = throughput_report(measured(*[(4.0, 4.08), (8.0, 8.16)] * 20), pictures=4, callers=2)
    assert report["lost_share"] == pytest.approx(0.0196, abs=1e-4)
    assert report["target"]["verdict"] == "missed"
    assert report["cpu_s"]["off"] == pytest.approx(1.5)
    assert report["cpu_s"]["added"] == pytest.approx(0.03)


def test_the_table_says_what_was_found_and_that_a_control_is_none() -> None:
    pairs = measured(*[(0.1, 0.102), (0.1, 0.1022)] * 50)
    throughput = throughput_report(pairs, pictures=12, callers=4)
    report = {
        "control": True,
        "model": "pico",
        "latency": latency_report(pairs),
        "throughput": throughput,
        "of_model": {"model": "builtin", **of_model_report(5.0, throughput["cpu_s"])},
    }
    table = table_of(report)
    cells = [list(column.cells) for column in table.columns]
    assert table.title == "telemetry, never turned on"
    assert cells[2][0] == "+2.10 ms"
    assert cells[4][0] == "<= 3 ms: met"
    assert cells[4][3] == "<= 1 %: missed"
    assert cells[4][-1] == "<= 1 %: met"


def test_of_a_larger_picture_the_same_time_is_a_smaller_share() -> None:
    added = {"added": 0.004, "added_95": [0.003, 0.005]}
    report = of_model_report(0.4, added)
    assert report["added_share"] == pytest.approx(0.01)
    assert report["added_share_95"] == pytest.approx([0.0075, 0.0125])
    assert report["target"]["verdict"] == "undecided"
    assert of_model_report(4.0, added)["target"]["verdict"] == "met"
