"""How many cards a rate of pictures needs: properties of the policy, and the command's words."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.capacity_plan import LIMITS_W, Headroom, Load, Option, cards_for, chosen, options
from cluster.card_kinds import KINDS
from cluster.measured_speeds import STEPS_OF, decode_cost, power_of, step_cost
from deployments.job_size import LATENT_PIXELS
from loadtest.sd35 import largest_side
from serve.__main__ import main
from serve.checkpoints.memory import FORWARD_HEADROOM, GIB, GUESSED_BYTES_PER_TOKEN
from serve.commands.cluster_plan import LONGEST_SIDE_OF

ROOT = Path(__file__).parents[2]
SIDES = st.integers(1, 128).map(lambda sixteens: 16 * sixteens)
LOADS = st.builds(
    Load,
    rate=st.floats(1e-3, 1e3),
    model=st.sampled_from(sorted(STEPS_OF)),
    width=SIDES,
    height=SIDES,
    steps=st.integers(1, 200),
    guided=st.booleans(),
)
HEADROOMS = st.builds(
    Headroom,
    utilisation=st.floats(0.05, 1.0),
    burst_reserve=st.floats(0, 2),
    heat=st.floats(0, 0.9),
)


def planned(load: Load, headroom: Headroom | None = None) -> list[Option]:
    return options(load, list(LIMITS_W), headroom or Headroom(), {})


def changed(load: Load, **fields: Any) -> Load:
    return Load(**{name: getattr(load, name) for name in load.__slots__} | fields)


@settings(max_examples=60, deadline=None)
@given(LOADS, st.sampled_from(["rate", "steps", "width", "height"]), st.integers(1, 40))
def test_more_work_never_needs_fewer_cards(load: Load, what: str, times: int) -> None:
    more = {"rate": load.rate * times, "steps": load.steps * times}
    sides = {"width": load.width + 16 * times, "height": load.height + 16 * times}
    larger = changed(load, **{what: (more | sides)[what]})
    for before, after in zip(planned(load), planned(larger), strict=True):
        assert after.work >= before.work * (1 - 1e-9)
        assert after.cards >= before.cards
        assert after.watts >= before.watts * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(LOADS, HEADROOMS)
def test_there_are_never_fewer_cards_than_work(load: Load, headroom: Headroom) -> None:
    for option in planned(load, headroom):
        assert option.cards >= max(option.work, 1)
        assert option.utilisation <= min(headroom.utilisation * (1 - headroom.heat) + 1e-6, 1)


@given(st.floats(1e-6, 1e4), st.floats(1e-6, 1e4), HEADROOMS)
def test_stages_that_share_cards_never_need_more(
    one: float, other: float, headroom: Headroom
) -> None:
    together = cards_for(one + other, headroom)
    assert together <= cards_for(one, headroom) + cards_for(other, headroom)


def test_measured_speeds_are_those_of_the_recordings() -> None:
    recordings = json.loads((ROOT / "loadtest/data/step_costs_h100.json").read_text())
    for model, recording in recordings.items():
        for cost in recording["costs"]:
            if cost["rows"] > 2:
                continue
            told = step_cost(model, 8 * cost["width"], 8 * cost["height"], guided=cost["rows"] == 2)
            assert told.seconds == pytest.approx(cost["seconds"], abs=1e-6)
            assert not told.is_estimate
    decoded = json.loads((ROOT / "loadtest/data/h100/decode_compiled.json").read_text())
    ms = decoded["compiled"]["1024"]["ms"]
    assert decode_cost(1024, 1024).seconds * 1e3 == pytest.approx(ms, abs=0.01)
    denoised = json.loads((ROOT / "loadtest/data/h100/denoise_large_1024.json").read_text())
    mean_w = denoised["sustained"]["kelvin"]["mean_w"]
    assert power_of("H100", 700.0).busy_w == pytest.approx(mean_w, abs=0.1)


def test_twenty_large_pictures_a_second_on_h100s() -> None:
    # By hand: 20 x 28 x 83.3 ms are 46.66 cards of work; 90 % of a card at 75 % make it 69.1.
    denoise = planned(Load(20, "large", 1024, 1024, 28, True))[0]
    assert denoise.card == "H100"
    assert denoise.cards == 70
    assert denoise.estimates == ()
    # One picture at a time at full power is 28 x 83.3 ms x 691 W = 1,612 J, and cards idle besides.
    assert 1612 < denoise.joules_per_picture < 1612 + 70 * 120.2 / 20


def test_what_was_not_measured_says_so() -> None:
    for option in planned(Load(1, "medium", 1024, 1024, 28, True)):
        if option.card != "H100":
            said = " ".join(option.estimates)
            assert KINDS[option.card].source in said
            assert f"watts of {option.card}" in said
    (between, *_) = planned(Load(1, "medium", 768, 1344, 28, True))
    assert "between two sizes measured" in " ".join(between.estimates)


def test_the_price_decides_only_where_every_kind_has_one() -> None:
    load, cards = Load(5, "large", 1024, 1024, 28, True), ["H100", "L4"]
    free_l4 = {"H100": 9.0, "L4": 0.0}
    assert [each.card for each in chosen(options(load, cards, Headroom(), free_l4))] == [
        "L4",
        "L4",
    ]
    unpriced: tuple[dict[str, float], ...] = ({}, {"L4": 0.0})
    for prices in unpriced:
        found = options(load, cards, Headroom(), prices)
        assert [each.card for each in chosen(found)] == ["H100", "H100"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(("cluster", "plan", *arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "--rate", "20", "--size", "1024", "--steps", "28", "--price", "h100=6", "--json"
    )
    assert code == 0
    body = json.loads(out)
    denoise = body["options"][0]
    assert (denoise["card"], denoise["cards"]) == ("H100", 70)
    assert denoise["usd_per_1000"] == pytest.approx(70 * 6 / 3600 / 20 * 1000)
    assert [each["usd_per_1000"] for each in body["options"] if each["card"] != "H100"] == [
        None
    ] * 4


def test_the_command_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--rate", "2", "--model", "medium", "--card", "L4")
    assert (code, out) == (0, "")
    assert "estimate, speed of L4" in err
    assert "Headroom" in err
    assert "USD" not in err
    assert "H100 for" not in err


@pytest.mark.parametrize("model", STEPS_OF)
def test_the_largest_pictures_that_are_planned_can_be_drawn_and_fit_every_card(model: str) -> None:
    longest = LONGEST_SIDE_OF[model]
    assert longest <= largest_side(STEPS_OF[model]) * LATENT_PIXELS
    pictures = (longest // 16) ** 2 + 333  # tokens, and of the prompt
    width = {"large": 2432, "medium": 1536}[STEPS_OF[model]]
    weights_gib = {"large": 7.7, "medium": 2.5}[STEPS_OF[model]]  # FP8
    forward = 2 * pictures * GUESSED_BYTES_PER_TOKEN * FORWARD_HEADROOM * width / 2432
    for card in LIMITS_W:
        room = KINDS[card].memory_gib
        assert room is not None
        assert forward / GIB + weights_gib < room


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("rate", ("--rate", "0")),
        ("rate", ("--rate", "nan")),
        ("rate", ("--rate", "many")),
        ("size", ("--size", "1000")),
        ("size", ("--size", "1024x")),
        ("size", ("--size", "3088")),  # Large draws 3072 at most
        ("steps", ("--steps", "0")),
        ("steps", ("--steps", "2.5")),
        ("model", ("--model", "xl")),
        ("card", ("--card", "B200")),
        ("price", ("--price", "H100=cheap")),
        ("price", ("--price", "H100=-1")),
        ("price", ("--price", "B200=1")),
        ("heat_headroom", ("--heat-headroom", "1")),
        ("utilisation", ("--utilisation", "0")),
    ],
)
def test_bad_options_are_named(
    capsys: pytest.CaptureFixture[str], field: str, options: tuple[str, ...]
) -> None:
    given_rate = () if "--rate" in options else ("--rate", "1")
    code, out, _ = run(capsys, *given_rate, *options, "--json")
    assert code == 2
    error = json.loads(out)["error"]
    assert error["field"] == field
    assert error["allowed"]
