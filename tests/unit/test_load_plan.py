"""What a load test asks for: the same each time, varied as said, and nothing that is absurd."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.builtin.read import read_claims
from loadtest.load_plan import LoadPlan, PlanOptions, make_plan
from loadtest.prompt_set import NAMES, read_prompts
from loadtest.request_mix import PLAIN, VARIED, ModelFacts, RequestMix
from serve.errors import InvalidRequest
from serve.requests import GenerateRequest

MODEL = ModelFacts("large", 1024, 1024, 28, 4.5, "euler", "normal", 16, 256, 1152)


def test_a_plan_is_the_same_each_time_and_survives_its_file(tmp_path: Path):
    options = PlanOptions(profile="burst", rate=5, duration_s=20, seed=3)
    plan = make_plan(options, MODEL, ("native", "openai"))
    assert plan == make_plan(options, MODEL, ("native", "openai"))
    plan.write(tmp_path / "plan.json")
    assert LoadPlan.read(tmp_path / "plan.json") == plan
    assert [ask.number for ask in plan.asks] == list(range(len(plan.asks)))
    assert {ask.door for ask in plan.asks} == {"native", "openai"}
    other = make_plan(replace(options, seed=4), MODEL, ("native", "openai"))
    assert [ask.request["prompt"] for ask in other.asks] != [a.request["prompt"] for a in plan.asks]
    for ask in plan.asks:
        GenerateRequest(**ask.request)


def test_prompts_repeat_by_zipfs_law_and_pictures_never():
    prompts = [f"prompt {number}" for number in range(50)]
    mix = RequestMix(MODEL, prompts, VARIED, 1)
    requests = [mix.request(number) for number in range(4000)]
    counts = [count for _, count in Counter(each["prompt"] for each in requests).most_common()]
    harmonic = sum(1 / rank for rank in range(1, 51))
    for rank in (1, 2, 10):
        assert counts[rank - 1] == pytest.approx(4000 / rank / harmonic, rel=0.25)
    assert len({each["seed"] for each in requests}) == 4000


def test_sizes_and_steps_vary_around_the_models_own():
    requests = [RequestMix(MODEL, ["a"], VARIED, 1).request(number) for number in range(500)]
    sizes = Counter((each["width"], each["height"]) for each in requests)
    assert set(sizes) == {(1024, 1024), (896, 1152), (1152, 896)}
    assert sizes[1024, 1024] == pytest.approx(350, rel=0.15)
    assert set(Counter(each["num_inference_steps"] for each in requests)) == {11, 20, 28, 39, 50}
    plain = [RequestMix(MODEL, ["a"], PLAIN, 1).request(number) for number in range(50)]
    assert {(e["width"], e["height"], e["num_inference_steps"]) for e in plain} == {
        (1024, 1024, 28)
    }


def test_sizes_keep_within_the_models_limits():
    small = replace(MODEL, width=64, height=64, smallest_side=64, largest_side=64)
    requests = [RequestMix(small, ["a"], VARIED, 1).request(number) for number in range(50)]
    assert {(each["width"], each["height"]) for each in requests} == {(64, 64)}


def test_a_trace_is_replayed_as_it_was_and_filled_from_the_mix(tmp_path: Path):
    trace = tmp_path / "trace.csv"
    trace.write_text("at_s,num_inference_steps\n0,7\n2.5,\n9,\n")
    plan = make_plan(PlanOptions(profile="replay", trace=trace), MODEL, ("native",))
    assert [ask.at for ask in plan.asks] == [0, 2.5, 9]
    assert plan.duration_s == 9
    assert plan.asks[0].request["num_inference_steps"] == 7
    assert all(ask.request["prompt"] for ask in plan.asks)
    short = PlanOptions(profile="replay", trace=trace, duration_s=5)
    assert len(make_plan(short, MODEL, ("native",)).asks) == 2


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"profile": "zigzag"}, "profile"),
        ({"door": "back"}, "door"),
        ({"mix": "odd"}, "mix"),
        ({"rate": 0.0}, "rate"),
        ({"rate": "fast"}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"duration_s": -1.0}, "duration"),
        ({"duration_s": float("inf")}, "duration"),
        ({"rate": 1000.0, "duration_s": 86400.0}, "duration"),
        ({"rate": 0.001, "duration_s": 0.001}, "duration"),
        ({"seed": "x"}, "seed"),
        ({"profile": "replay"}, "trace"),
        ({"trace": Path("a.csv")}, "trace"),
        ({"prompts": "/no/such/file"}, "prompts"),
    ],
)
def test_what_is_absurd_is_refused_by_name(wrong: dict[str, Any], field: str):
    with pytest.raises(InvalidRequest) as refused:
        make_plan(PlanOptions(**wrong), MODEL, ("native",))
    assert refused.value.field == field
    assert refused.value.allowed


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_prompts_state_their_licence(name: str):
    prompts = read_prompts(name)
    assert len(set(prompts)) == len(prompts) >= 60
    file = Path("loadtest/prompts") / f"{name}.txt"
    assert "Licence: CC0 1.0" in (Path(__file__).parents[2] / file).read_text()


def test_the_checker_can_judge_every_scene():
    for prompt in read_prompts("scenes"):
        read_claims(prompt)


def test_a_file_of_prompts_is_read_as_editors_show_it(tmp_path: Path):
    file = tmp_path / "mine.txt"
    file.write_bytes("\ufeff# mine\r\none\u2028line\x85 with\x0b breaks\r\n  a cat \r\n".encode())
    assert read_prompts(str(file)) == ["one\u2028line\x85 with\x0b breaks", "a cat"]


def test_what_of_a_plan_was_due_until_it_was_stopped():
    plan = make_plan(PlanOptions(rate=5, duration_s=20), MODEL, ("native",))
    begun = plan.until(7.5)
    assert begun.asks == tuple(ask for ask in plan.asks if ask.at <= 7.5)
    assert 0 < len(begun.asks) < len(plan.asks)
    assert begun.duration_s == 7.5
    assert plan.until(25.0) == plan


def test_an_empty_file_of_prompts(tmp_path: Path):
    (tmp_path / "none.txt").write_text("# only words about it\n\n")
    with pytest.raises(InvalidRequest) as refused:
        read_prompts(str(tmp_path / "none.txt"))
    assert refused.value.field == "prompts"
