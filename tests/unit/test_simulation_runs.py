"""Whole simulated runs: requests are conserved, seeds decide, incidents hit, files are checked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.simulate import draw, simulate
from cluster.simulation.intervals import mean_and_half, paired
from cluster.simulation.policies import POLICIES, Policy, policy
from cluster.simulation.queue_only import QueueOnlySettings
from cluster.simulation.scenario import (
    HELD_OUT_SEEDS,
    Scenario,
    held_out_names,
    load_scenario,
    parse_scenario,
    scenario_names,
)
from cluster.simulation.suite import run_suite
from cluster.simulation.traffic import mean_rate, requests_of
from cluster.simulation.world import World
from serve.errors import ConfigurationError

STAGE = {"kind": "L4", "seconds": 0.4}


def _scenario(**changes: Any) -> Scenario:
    given = {
        "name": "small",
        "description": "A few L4s.",
        "duration_s": 300,
        "warm_up_s": 60,
        "cards": [{"kind": "L4", "number": 4, "initial": 3, "start_s": 40}],
        "text": STAGE,
        "decode": STAGE,
        "reference_kind": "L4",
        **changes,
    }
    return parse_scenario(given)


FAILING = [{"what": "failed-cooling", "at_s": 60, "share": 0.5, "hindrance": 6}]
RECLAIMED = [{"what": "spot-reclaims", "per_card_hour": 20, "notice_s": 5, "away_s": 60}]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("events", [FAILING, RECLAIMED])
def test_every_request_ends_exactly_once(name, events):
    scenario = _scenario(events=events, traffic={"load": 0.5})
    world = World(scenario, Policy(name).control, 1)
    figures = world.run().figures
    came = list(requests_of(scenario, 1))
    # `finished` raises where a request ends twice.
    assert world.measures.arrived == len(came) > 10
    assert world.measures.ended == len(came)
    assert figures["unfinished"] == 0
    assert all(pool.waiting == type(pool.waiting)() for pool in world.pools)
    assert sum(one.ongoing for pool in world.pools for one in pool.replicas) == 0
    if events is RECLAIMED:
        assert figures["restarts"] > 0


@pytest.mark.parametrize("name", ["threshold", "kelvin"])
def test_the_seed_decides(name):
    warmer = {"what": "ambient", "at_s": 30, "by_c": 15}
    scenario = _scenario(events=[warmer, *RECLAIMED], duration_s=150)
    first, again, other = (World(scenario, Policy(name).control, seed).run() for seed in (1, 1, 2))
    assert first.figures == again.figures
    assert first.series == again.series
    assert first.figures != other.figures


def test_a_single_request_takes_its_unloaded_time():
    scenario = _scenario(traffic={"load": 0.02, "sides": {1024: 1}}, duration_s=1500)
    world = World(scenario, Policy("queue-only").control, 3)
    figures = world.run().figures
    first = next(requests_of(scenario, 3))
    assert figures["p50_s"] == pytest.approx(world.measures.unloaded_s(first), abs=2e-3)
    assert figures["slo_attainment"] == 1


def test_heat_slows_a_cluster_and_shows():
    cool = World(_scenario(), Policy("queue-only").control, 1).run().figures
    hot = World(_scenario(events=FAILING), Policy("queue-only").control, 1).run().figures
    assert cool["throttled_gpu_s"] == 0
    assert hot["throttled_gpu_s"] > 100
    assert hot["p95_s"] > cool["p95_s"]
    assert hot["peak_temperature_c"] >= 85 > cool["peak_temperature_c"]


def test_a_choice_kept_for_several_steps_changes_little():
    exact = _scenario(keep_choice_steps=1, traffic={"load": 0.6})
    kept = _scenario(keep_choice_steps=4, traffic={"load": 0.6})
    one = World(exact, Policy("queue-only").control, 1).run().figures
    other = World(kept, Policy("queue-only").control, 1).run().figures
    assert other["p50_s"] == pytest.approx(one["p50_s"], rel=0.15)


def test_warmer_air_arrives_over_its_time():
    scenario = _scenario(events=[{"what": "ambient", "at_s": 100, "by_c": 12, "within_s": 50}])
    world = World(scenario, Policy("queue-only").control, 1)
    before = world.cards.thermal.ambient_c.copy()
    world.run()
    assert world.cards.thermal.ambient_c - before == pytest.approx(12.0)


@pytest.mark.parametrize(
    "arrivals",
    [
        {"shape": "steady"},
        {"shape": "diurnal", "period_s": 20000, "swing": 0.7},
    ],
)
def test_traffic_has_the_load_that_was_asked_for(arrivals):
    scenario = _scenario(duration_s=40000, traffic={"load": 0.6, "arrivals": arrivals})
    requests = list(requests_of(scenario, 1))
    assert len(requests) / 40000 == pytest.approx(mean_rate(scenario), rel=0.05)
    assert [one.at for one in requests] == sorted(one.at for one in requests)


def test_a_burst_is_five_times_as_much():
    arrivals = {"shape": "burst", "factor": 5, "starts_s": [10000], "lasts_s": 10000}
    scenario = _scenario(duration_s=20000, traffic={"load": 0.2, "arrivals": arrivals})
    times = [one.at for one in requests_of(scenario, 1)]
    calm = sum(at < 10000 for at in times)
    assert (len(times) - calm) / calm == pytest.approx(5, rel=0.15)


def test_recorded_traffic(tmp_path):
    file = tmp_path / "traffic.csv"
    file.write_text(
        "at_s,width,height,num_inference_steps,guidance_scale\n"
        "1.5,1024,1024,28,4.5\n2.0,512,768,8,1.0\n"
    )
    recorded = {"arrivals": {"shape": "recorded", "file": str(file)}}
    first, second = requests_of(_scenario(traffic=recorded), 1)
    assert (first.at, first.rows, first.steps) == (1.5, 2, 28)
    assert (second.shape.height, second.shape.width, second.rows) == (96, 64, 1)
    file.write_text("at_s,width\n1,2\n")
    with pytest.raises(ConfigurationError) as told:
        list(requests_of(_scenario(traffic=recorded), 1))
    assert told.value.field == "traffic.arrivals.file"


@pytest.mark.parametrize("name", [*scenario_names(), "day"])
def test_shipped_scenarios_are_sound(name):
    scenario = load_scenario(name)
    assert scenario.name == name
    assert not set(scenario.seeds) & set(scenario.tuning_seeds)
    if name != "day":
        assert len(scenario.seeds) == 5


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"duration_s": -1}, "duration_s"),
        ({"unknown": 1}, "unknown"),
        ({"cards": []}, "cards"),
        ({"cards": [{"kind": "H900", "number": 1, "initial": 1}]}, "cards.0.kind"),
        ({"cards": [{"kind": "L4", "number": 1, "initial": 2}]}, "cards.0"),
        ({"warm_up_s": 900}, "scenario"),
        ({"seeds": [101], "tuning_seeds": [101]}, "scenario"),
        ({"traffic": {"sides": {1000: 1}}}, "traffic"),
        ({"traffic": {"arrivals": {"shape": "odd"}}}, "traffic.arrivals"),
        ({"events": [{"what": "flood"}]}, "events.0"),
    ],
)
def test_a_wrong_scenario_is_told_by_field(changes, field):
    with pytest.raises(ConfigurationError) as told:
        _scenario(**changes)
    assert told.value.field == field


def test_files_that_are_no_scenarios(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_scenario("no-such-scenario")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigurationError, match="mapping"):
        load_scenario(str(tmp_path / "list.yaml"))


def test_policies_by_name(tmp_path):
    assert policy("kelvin", "steady").settings is None
    with pytest.raises(ConfigurationError):
        policy("oracle", "steady")
    chosen = tmp_path / "chosen.json"
    given = {"target_ongoing_requests": 1.5, "downscale_delay_s": 60.0}
    chosen.write_text(json.dumps({"chosen": {"steady": {"queue-only": {"settings": given}}}}))
    found = policy("queue-only", "steady", chosen).settings
    assert isinstance(found, QueueOnlySettings)
    assert found.target_ongoing_requests == 1.5
    chosen.write_text("{}")
    with pytest.raises(ConfigurationError):
        policy("queue-only", "steady", chosen)


def test_intervals_are_students():
    mean, half = mean_and_half([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3
    assert half == pytest.approx(2.7764 * 1.5811 / 5**0.5, rel=1e-3)
    assert mean_and_half([2.0]) == (2.0, None)
    assert paired([3, 5], [1, 2])["by_seed"] == [2, 3]
    with pytest.raises(ValueError, match="no values"):
        mean_and_half([])


def test_a_small_suite_and_its_page(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps(_scenario(events=FAILING, duration_s=150).model_dump(mode="json")))
    found = run_suite([str(file)], 2, 1)
    cell = found["cells"][str(file)]["kelvin"]["slo_attainment"]
    assert len(cell["by_seed"]) == 2
    assert cell["half_of_95_percent_interval"] is not None
    assert found["targets"]
    fresh = run_suite([str(file)], 1, 1, held_out=True)["scenarios"][str(file)]["seeds"]
    assert fresh == [HELD_OUT_SEEDS[0]]
    assert not set(HELD_OUT_SEEDS) & set(found["scenarios"][str(file)]["seeds"])
    for name in (*scenario_names(), *held_out_names()):
        scenario = load_scenario(name)
        assert not set(HELD_OUT_SEEDS) & {*scenario.seeds, *scenario.tuning_seeds}
    json.dumps(found, allow_nan=False)
    report, series = simulate(load_scenario(str(file)), ["queue-only", "kelvin"])
    json.dumps(report, allow_nan=False)
    for name in ("page.png", "page.html"):
        draw(report, series, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    with pytest.raises(ConfigurationError):
        draw(report, series, tmp_path / "page.pdf")
