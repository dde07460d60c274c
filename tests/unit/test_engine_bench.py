"""The engine benchmark: rivals and clock by hand, the acceptance cells in small, the command."""

import json
from pathlib import Path

import pytest

from deployments.step_costs import StepCosts, TokenShape
from loadtest.arrivals import MIXES, Arrival, Mix, draw, square
from loadtest.cost_files import RECORDED, read_recording
from loadtest.engine_bench import main
from loadtest.engine_cells import ARMS, KELVIN, cell, saturated
from loadtest.latencies import percentile, summary
from loadtest.load_plot import draw_plot
from loadtest.rivals import serve_batches
from loadtest.virtual_clock import serve_steps

SHAPE = square(512)


def linear() -> StepCosts:
    costs = StepCosts()
    for rows in (2, 4):
        costs.observe(SHAPE, rows, 0.5 * rows)  # a pair takes 1 s, two take 2
    return costs


def pairs(*at: float, steps: int = 2) -> list[Arrival]:
    return [Arrival(key, when, SHAPE, 2, steps) for key, when in enumerate(at)]


def test_one_at_a_time_is_a_queue() -> None:
    run = serve_batches(pairs(0.0, 0.5, 10.0), linear(), 1)
    assert run.finished_at == {0: 2.0, 1: 4.0, 2: 12.0}


def test_a_batch_takes_what_waits_and_runs_to_its_end() -> None:
    run = serve_batches(pairs(0.0, 0.5, 0.6, 0.7), linear(), 2)
    assert run.finished_at == {0: 2.0, 1: 6.0, 2: 6.0, 3: 8.0}
    assert (run.forwards, run.row_steps) == (6, 16)


def test_a_batch_is_of_equal_shape_and_steps_and_the_oldest_first() -> None:
    arrivals = [
        Arrival(0, 0.0, SHAPE, 2, 2),
        Arrival(1, 0.1, SHAPE, 2, 1),
        Arrival(2, 0.2, SHAPE, 2, 2),
        Arrival(3, 0.3, SHAPE, 2, 1),
    ]
    assert serve_batches(arrivals, linear(), 2).finished_at == {0: 2.0, 1: 4.0, 3: 4.0, 2: 6.0}


def test_no_batch_of_nobody() -> None:
    with pytest.raises(ValueError, match="batch"):
        serve_batches(pairs(0.0), linear(), 0)


def test_the_clock_jumps_over_idle_time_and_lets_newcomers_in_between_steps() -> None:
    seen: list[tuple[float, int]] = []

    def everyone(works, costs, now):
        seen.append((now, len(works)))
        return tuple(work.key for work in works)

    run = serve_steps(pairs(0.0, 0.5, 20.0), linear(), everyone)
    assert seen == [(0.0, 1), (1.0, 2), (3.0, 1), (20.0, 1), (21.0, 1)]
    assert run.finished_at == {0: 3.0, 1: 4.0, 2: 22.0}
    later = serve_steps(pairs(0.0), linear(), everyone, between_forwards_s=0.25)
    assert later.finished_at == {0: 2.5}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_finishes_everyone_and_does_the_same_work(arm: str) -> None:
    costs, _ = read_recording(RECORDED, "medium")
    arrivals = draw(MIXES[-1], 200, 1.0, seed=4)
    run = ARMS[arm](arrivals, costs)
    assert set(run.finished_at) == {arrival.key for arrival in arrivals}
    assert run.row_steps == sum(arrival.rows * arrival.steps for arrival in arrivals)
    for arrival in arrivals:
        alone = arrival.steps * min(
            costs.seconds(arrival.shape, rows) for rows in range(arrival.rows, 33)
        )
        assert run.finished_at[arrival.key] - arrival.at >= alone * 0.999


def test_arrivals_are_the_same_for_a_seed_and_poisson() -> None:
    mix = MIXES[-1]
    first, again = draw(mix, 3000, 2.0, 1), draw(mix, 3000, 2.0, 1)
    assert first == again != draw(mix, 3000, 2.0, 2)
    assert first[-1].at == pytest.approx(1500, rel=0.1)
    gaps = [b.at - a.at for a, b in zip(first, first[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert spread == pytest.approx(mean, rel=0.1)  # as an exponential distribution has it
    assert [one.steps for one in draw(mix, 50, None, 1)] == [one.steps for one in first[:50]]
    unguided = sum(arrival.rows == 1 for arrival in first) / len(first)
    assert unguided == pytest.approx(0.25, abs=0.03)


def test_percentiles_are_of_the_values() -> None:
    values = [float(value) for value in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.95)) == (50.0, 95.0)
    assert percentile([3.0], 0.99) == 3.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_slowdown_is_against_an_idle_card() -> None:
    costs = linear()
    figures = summary([serve_batches(pairs(0.0, 0.0), costs, 1)], costs)
    assert figures.slowdown_p95 == 2.0
    assert figures.throughput == 0.5
    assert figures.rows_per_forward == 2.0


@pytest.mark.parametrize("model", ["large", "medium"])
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.name)
def test_saturated_throughput_is_that_of_the_best_rival(model: str, mix: Mix) -> None:
    costs, _ = read_recording(RECORDED, model)
    assert saturated(model, mix, costs)["throughput_ratio"] >= 0.97


# A sample of the acceptance cells, on arrivals the constants were not chosen on; the bounds allow
# for the noise of so few requests.
@pytest.mark.parametrize(
    ("mix", "load", "most"), [(MIXES[0], 0.5, 1.06), (MIXES[1], 0.7, 1.06), (MIXES[2], 0.9, 0.9)]
)
def test_p95_against_the_best_rival(mix: Mix, load: float, most: float) -> None:
    costs, _ = read_recording(RECORDED, "medium")
    full = saturated("medium", mix, costs)
    one = cell("medium", mix, costs, load, full["rate"], 1500, [1001])
    assert one["p95_ratio"] <= most
    assert one["best_rival"] != KELVIN


def test_one_at_a_time_would_be_seen() -> None:
    costs, _ = read_recording(RECORDED, "medium")
    one = cell(
        "medium", MIXES[-1], costs, 0.8, saturated("medium", MIXES[-1], costs)["rate"], 500, [7]
    )
    arms = one["arms"]
    assert arms[KELVIN]["p95"] < 0.9 * arms["one at a time"]["p95"]
    assert arms[KELVIN]["slowdown_p95"] < 0.5 * arms["one at a time"]["slowdown_p95"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.png"
    arguments = ["--json", "--number", "60", "--seeds", "5", "--model", "large", "--loads", "0.5"]
    assert main([*arguments, "--markdown", "--plot", str(plot)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["complete"] is True
    assert len(report["saturated"]) == len(report["cells"]) == 3
    assert set(report["cells"][0]["arms"]) == set(ARMS)
    assert {"throughput_ratio", "p95_ratio", "p95_ratio_mixed"} == set(report["targets"])
    assert report["costs"]["large"]["device"]
    assert plot.stat().st_size > 0
    assert draw_plot(report).size[0] > 300


def test_a_recording_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert main(["--costs", str(tmp_path / "none.json")]) == 1


def test_shapes_of_pictures() -> None:
    assert square(1024) == TokenShape(128, 128, 333)
