"""The benchmark's replay and recorder, in small on the CPU: what a card will run must run here."""

import json
from pathlib import Path

import pytest
import torch

from deployments.step_costs import TokenShape
from loadtest.arrivals import Arrival, square
from loadtest.cost_files import read_recording
from loadtest.engine_bench import main as engine_bench
from loadtest.engine_replay import Replay, compare
from loadtest.record_step_costs import load_mmdit, record
from loadtest.record_step_costs import main as record_step_costs
from serve.errors import KelvinError

CPU = ["--device", "cpu", "--precision", "fp32", "--warm-s", "0"]


def test_a_recording_is_what_the_benchmark_reads(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    arguments = ["--model", "tiny", "--out", str(path), "--sides", "64", "--rows", "1", "2"]
    assert record_step_costs([*arguments, *CPU, "--number", "2"]) == 0
    costs, told = read_recording(path, "tiny")
    assert costs.is_measured(square(64), 2)
    assert {"device", "torch", "command", "date", "source"} <= set(told)


def test_counts_that_only_the_smaller_size_takes_are_left_out_of_the_larger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loadtest.record_step_costs._MOST_TOKENS", 1500)
    mmdit = load_mmdit("tiny", torch.device("cpu"), "fp32")
    measured = record(mmdit, (64, 256), (1, 2, 3), warm_s=0.01, number=1)
    assert measured.is_measured(square(64), 3)
    assert measured.is_measured(square(256), 2)
    assert not measured.is_measured(square(256), 3)


@pytest.mark.parametrize("model", ["tiny", "pico"])
def test_the_command_replays_a_cell(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gpu", "--json", "--model", model, "--mix", "mixed", "--sides", "64", "128"]
    shape_of_work = ["--steps", "2", "3", "--rows", "1", "2", "4", "--replay-s", "0.5"]
    assert engine_bench([*arguments, *shape_of_work, *CPU]) == 0
    report = json.loads(capsys.readouterr().out)
    replay = report["replay"]
    assert replay["requests"] == replay["real"]["requests"] == replay["virtual"]["requests"] >= 1
    assert set(replay["real_to_virtual"]) == {"p50", "p95", "throughput"}
    assert isinstance(replay["met"], bool)


def test_everyone_is_served_and_the_work_is_the_same() -> None:
    mmdit = load_mmdit("tiny", torch.device("cpu"), "fp32")
    measured = record(mmdit, (64,), (1, 2), warm_s=0, number=1)
    arrivals = [
        Arrival(0, 0.0, square(64), 2, 3),
        Arrival(1, 0.0, square(64), 1, 2),
        Arrival(2, 0.02, square(128), 2, 2),
    ]
    replay = Replay(mmdit, measured)
    report = compare(replay, arrivals, measured, recorded=measured)
    # Steps of 2 x 3, 1 x 2 and 2 x 2 rows in 5 to 7 forwards: the first two requests may share.
    assert 12 / 7 <= report["real"]["rows_per_forward"] <= 12 / 5
    assert set(replay.observed.as_json()) == {"costs"}
    assert "real_to_virtual_on_recorded" in report


def test_a_request_that_fails_is_told() -> None:
    mmdit = load_mmdit("tiny", torch.device("cpu"), "fp32")
    measured = record(mmdit, (64,), (2,), warm_s=0, number=1)
    largest = square(8 * mmdit.largest_side)
    too_large = Arrival(0, 0.0, TokenShape(largest.height + 2, largest.width, 333), 2, 1)
    with pytest.raises(KelvinError):
        Replay(mmdit, measured).serve([too_large])
