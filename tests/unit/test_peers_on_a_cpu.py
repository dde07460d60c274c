"""What the comparison behind HTTP comes to, and what the articles' claims do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.builtin.world import Example
from loadtest import claims, claims_measured, peers
from loadtest.peer_callers import Job, Served
from loadtest.peer_figures import AloneCosts, figures, targets_of
from loadtest.peers_on_a_cpu import MIXED_STEPS, Jobs, in_turn

COSTS = AloneCosts({4: 1.0, 14: 2.0})


@pytest.fixture
def example() -> Example:
    return Jobs(4).take(1, "equal", "")[0].example


def served(example: Example, at: float, seconds: float, *, came: bool = True) -> Served:
    return Served(Job(example, 4, 0), at, 0.001, seconds, b"png" if came else None)


def test_what_a_picture_takes_alone_is_linear_in_its_steps():
    assert [COSTS.seconds(steps) for steps in (4, 9, 24)] == pytest.approx([1.0, 1.5, 3.0])


def test_every_arm_is_asked_for_the_same_mix_and_no_prompt_twice():
    first, second = (Jobs(8).take(50, "mixed", "seed") for _ in range(2))
    assert first == second
    assert {job.steps for job in first} == set(MIXED_STEPS)
    assert {job.steps for job in Jobs(8).take(20, "equal", "seed")} == {8}
    assert len({job.seed for job in first}) == 50


def test_figures_count_from_when_a_request_was_due_and_failures_are_late(example):
    rounds = [
        [served(example, 0.0, 1.0), served(example, 1.0, 4.0)],
        [served(example, 0.0, 2.0), served(example, 1.0, 0.5, came=False)],
    ]
    found = figures(rounds, COSTS)
    assert found["requests"] == 4
    assert found["failed"] == 1
    assert found["in_time"] == 0.5  # 4 s is more than three times one second
    assert found["pictures_per_s"]["least"] == pytest.approx(2 / 5, abs=1e-4)
    assert found["pictures_per_s"]["most"] == pytest.approx(1 / 2, abs=1e-4)
    assert found["p95_s"] == pytest.approx(4.0)
    assert not found["generator"]["is_bottleneck"]


def test_an_arm_that_answers_little_has_no_percentiles_to_win_by(example):
    rounds = [[served(example, 0.0, 0.1), *[served(example, 1.0, 9.0, came=False)] * 9]]
    assert "p95_s" not in figures(rounds, COSTS)


def arm(per_s: float, p95_s: float, failed: int = 0) -> dict[str, Any]:
    return {"pictures_per_s": {"median": per_s}, "p95_s": p95_s, "failed": failed}


def test_kelvin_is_judged_against_the_best_peer_and_harder_where_steps_are_mixed():
    arms = {"tutorial": arm(1.0, 5.0), "fastapi": arm(0.9, 4.0), "kelvin": arm(0.96, 4.0)}
    targets = targets_of({"loads": {"equal, 80 %": arms, "mixed, 80 %": arms}})
    assert targets["equal, 80 %, pictures/s over the best peer's"]["met"]
    assert targets["equal, 80 %, p95 over the best peer's"] == {
        "at_most": 1.03,
        "is": 1.0,
        "met": True,
    }
    assert not targets["mixed, 80 %, p95 over the best peer's"]["met"]


def test_who_answers_few_or_loses_more_than_a_peer_has_won_nothing():
    few = arm(1.0, 0.0) | {"failed": 9}
    del few["p95_s"]
    peers_of_it = {"tutorial": arm(1.0, 5.0, failed=2), "fastapi": arm(0.5, 9.0, failed=1)}
    targets = targets_of({"loads": {"equal, 50 %": {**peers_of_it, "kelvin": few}}})
    assert not targets["equal, 50 %, p95 over the best peer's"]["met"]
    assert targets["equal, 50 %, failed"] == {"at_most": 1, "is": 9, "met": False}


def test_a_load_under_which_nothing_was_due_is_not_judged():
    nothing = figures([[]], COSTS)
    arms = {"tutorial": nothing, "kelvin": nothing}
    assert targets_of({"loads": {"equal, 50 %": arms}}) == {}
    table = peers.loads_table({"loads": {"equal, 50 %": arms}})
    assert table.row_count == 2


def test_the_order_of_arms_turns_from_one_turn_of_a_load_to_the_next():
    loads, names = range(6), ["a", "b", "c"]
    for load in loads:
        first, second = (list(in_turn(names, turn, load)) for turn in range(2))
        assert first == second[::-1]
        assert list(in_turn(names, 0, load + 1)) == second


def test_an_arm_of_the_claims_that_does_not_come_up_is_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def server(name: str, *_: Any) -> Any:
        raise RuntimeError(f"{name} did not come up: no such port")

    monkeypatch.setattr(claims_measured, "server", server)
    monkeypatch.setattr(claims_measured, "measure_generator", dict)
    monkeypatch.setattr(claims_measured, "dequantized_directory", lambda *_: tmp_path)
    assert claims.main(["--device", "cpu", "--json"]) == 1
    captured = capsys.readouterr()
    assert "tutorial did not come up" in captured.err
    assert not json.loads(captured.out.splitlines()[-1])["complete"]


def test_claims_are_judged_by_what_was_read_and_say_where_nothing_was():
    peer = {"latency_s": 5.0, "saturated_per_s": 0.2, "memory_gib": 30.0, "mean_w": None}
    ours = {"latency_s": 3.0, "saturated_per_s": 0.3, "memory_gib": 15.0, "mean_w": None}
    peer["temperature_c"], ours["temperature_c"] = 57.0, 48.0
    lines = {line["what"]: line for line in claims.table_of({"tutorial": peer, "kelvin": ours})}
    assert lines["latency"]["measured"] == "-40 %"
    assert {name: line["holds"] for name, line in lines.items()} == {
        "latency": True,
        "throughput": False,  # +50 %
        "memory": True,
        "power": None,
        "temperature": True,
        "CLIP score": None,
        "FID": None,
    }
    assert lines["power"]["measured"] == claims.NO_READING
    assert lines["FID"]["measured"] == claims.NOT_TESTABLE


def test_claims_serve_both_arms_at_one_rate_and_draw_them(tmp_path: Path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out, picture = tmp_path / "claims.json", tmp_path / "claims.png"
    try:
        claims.main(
            ["--in-process", "--device", "cpu", "--cell", "tiny-64", "--seconds", "3"]
            + ["--saturated", "2", "--plot", str(picture), "--out", str(out)]
        )
    finally:
        torch.set_num_threads(threads)
    report = json.loads(out.read_text())
    assert report["complete"]
    asked = {name: [at for at, _ in arm["latencies"]] for name, arm in report["arms"].items()}
    assert asked["tutorial"] == asked["kelvin"]
    assert len(asked["kelvin"]) > 0
    assert picture.stat().st_size > 0


@pytest.mark.parametrize(
    "arguments", [["--arms", "torchao"], ["--loads", "none"], ["--mixes", "odd"]]
)
def test_what_the_cpu_has_not_is_refused(arguments):
    with pytest.raises(SystemExit) as refused:
        peers.parse_arguments(arguments)
    assert refused.value.code == 2


def test_the_cpu_is_asked_for_all_servers_unless_told_otherwise():
    assert "fastapi" in peers.parse_arguments([]).arms
    assert peers.parse_arguments(["--arms", "kelvin,fastapi"]).arms == ("kelvin", "fastapi")
