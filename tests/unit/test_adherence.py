"""The arithmetic behind adherence figures, and the prompts that they are over."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.builtin.checker import Verdict
from deployments.builtin.held_out import contains_held_out, states_held_out
from deployments.builtin.world import check, draw, read_claims
from loadtest.adherence import parse_arguments
from loadtest.negative_prompts import Shown, compare, first_color, shown
from loadtest.seen_combinations import against_seen, difference, seen_prompts
from loadtest.shares import paired_loss, wilson_interval
from loadtest.trials import Trial, held_out_prompts, holds, judge, summarise

OUTCOMES = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def columns(pairs: list[tuple[bool, bool]]) -> tuple[list[bool], list[bool]]:
    return [before for before, _ in pairs], [after for _, after in pairs]


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe (1998), table I, method 3; at the ends 3.84146 / (n + 3.84146)
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)],
)
def test_wilson_interval_is_the_published_one(right, n, low, high):
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 400), st.integers(0, 400))
def test_wilson_interval_holds_the_share_and_narrows(right, more):
    n = right + more
    low, high = wilson_interval(right, n)
    assert 0 <= low <= high <= 1
    if n:
        assert low <= right / n <= high
        wider_low, wider_high = low, high
        low, high = wilson_interval(4 * right, 4 * n)
        assert high - low < wider_high - wider_low


def test_a_share_above_one_is_refused():
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)


@given(OUTCOMES)
def test_paired_loss_is_net_and_its_bound_is_above_it(pairs):
    loss = paired_loss(*columns(pairs))
    before, after = columns(pairs)
    assert loss["loss"] == pytest.approx((sum(before) - sum(after)) / len(pairs))
    assert loss["lost"] - loss["gained"] == sum(before) - sum(after)
    assert loss["upper_95"] > loss["loss"] or loss["loss"] > 0.5


def test_pairs_that_agree_are_no_certainty_but_many_come_near_it():
    few, many = (paired_loss([True] * n, [True] * n)["upper_95"] for n in (20, 500))
    assert few > 0.05
    assert 0 < many < 0.01


def test_the_bound_covers_the_true_loss_as_often_as_it_says():
    rng = random.Random(0)
    true_loss, trials, covered = 0.05, 2000, 0
    for _ in range(trials):
        before = [rng.random() < 0.85 for _ in range(150)]
        # Lost with 0.08, gained with 0.2 where wrong: 0.85 * 0.08 - 0.15 * 0.12 = 0.05
        after = [rng.random() < (0.92 if right else 0.12) for right in before]
        covered += paired_loss(before, after)["upper_95"] >= true_loss
    assert 0.93 < covered / trials < 0.98


@pytest.mark.parametrize(("before", "after"), [([], []), ([True], [True, False])])
def test_pairs_that_are_none_are_refused(before, after):
    with pytest.raises(ValueError, match=r"needs prompts|zip\(\)"):
        paired_loss(before, after)


def test_held_out_prompts_depend_on_their_arguments_only():
    random.seed(1)
    first = held_out_prompts(60, 5, 256, 256)
    random.seed(2)
    assert held_out_prompts(60, 5, 256, 256) == first
    assert held_out_prompts(60, 6, 256, 256) != first
    assert [kind for kind, _ in first] == ["core"] * 36 + ["hard"] * 24


def test_every_prompt_states_what_training_never_saw():
    for height, width in ((256, 256), (192, 320)):
        for kind, example in held_out_prompts(80, 3, height, width):
            assert states_held_out(example.claims)
            assert contains_held_out(example.scene)
            assert read_claims(example.prompt) == example.claims
            number = holds(example.claims)
            assert kind == "hard" or number in ("one thing", "two things")


def test_scenes_as_drawn_are_judged_right_and_those_of_other_prompts_wrong():
    chosen = held_out_prompts(40, 4, 256, 256)
    claims = [example.claims for _, example in chosen]
    frames = draw([example.scene for _, example in chosen])
    pictures = [np.ascontiguousarray(f) for f in frames.permute(0, 2, 3, 1).numpy()]
    rights = [verdict.all_right for verdict in judge(pictures, claims)]
    assert sum(rights) >= 39
    swapped = [check(picture, claims[index - 1]) for index, picture in enumerate(pictures)]
    assert sum(verdict.all_right for verdict in swapped) <= 1


def trial(kind, prompt, **attributes: bool) -> Trial:
    example = next(e for k, e in held_out_prompts(40, 0, 256, 256) if holds(e.claims) == prompt)
    return Trial(kind, example, 0, Verdict(attributes, ()))


def test_a_summary_counts_each_attribute_where_it_is_stated():
    report = summarise(
        [
            trial("core", "one thing", color=True, shape=True),
            trial("core", "one thing", color=True, shape=False),
            trial("core", "two things", color=False, shape=True, relation=True),
            trial("hard", "a word", color=True, word=False),
        ]
    )
    core = report["core"]
    assert core["n"] == 3
    assert core["all_right"] == pytest.approx(1 / 3)
    assert core["interval_95"] == list(wilson_interval(1, 3))
    assert core["attributes"] == {
        "color": {"n": 3, "right": pytest.approx(2 / 3)},
        "relation": {"n": 1, "right": 1.0},
        "shape": {"n": 3, "right": pytest.approx(2 / 3)},
    }
    assert core["by_content"] == {
        "one thing": {"n": 2, "right": 0.5},
        "two things": {"n": 1, "right": 0.0},
    }
    assert report["hard"]["all_right"] == 0.0
    assert "hard" not in summarise([trial("core", "one thing", color=True)])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--n", "0"],
        ["--rows", "-1"],
        ["--precision", "bf16,int4"],
        ["--guidance-scale", "1"],
        ["--guidance-scale", "nan"],
        ["--width", "250"],
        ["--num-inference-steps", "0"],
    ],
)
def test_nonsense_is_refused_before_a_model_is_loaded(arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        parse_arguments(arguments)
    assert refused.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_negative_prompts_are_counted_pair_by_pair():
    def shown(*colors: str) -> Shown:
        return Shown(frozenset(colors), bool(colors))

    without = [shown("red"), shown("blue"), shown("green", "pink"), shown()]
    assert [first_color(picture) for picture in without] == ["red", "blue", "green", "red"]
    named = [shown("blue"), shown("blue"), shown("pink"), shown("red")]
    own = [shown("blue"), shown("blue"), shown(), shown("red")]
    report = compare(without, named, own)
    assert report["red"] == {"without": 1, "negative_red": 1}
    counted = {
        name: (report[name]["count"], report[name]["n"])
        for name in (
            "no_red_under_negative_red",
            "red_removed",
            "own_color_removed",
            "other_color_kept_under_negative_red",
        )
    }
    assert counted == {
        "no_red_under_negative_red": (3, 4),
        "red_removed": (1, 1),
        "own_color_removed": (2, 3),
        "other_color_kept_under_negative_red": (1, 2),
    }
    assert report["red_removed"]["interval_95"] == list(wilson_interval(1, 1))
    assert report["prompt_holds"] == {"without": 3, "negative_red": 4, "negative_own_color": 3}


def test_the_colours_of_a_drawn_scene_are_shown():
    for _, example in seen_prompts(12, 1, 256, 256):
        scene = example.scene
        if scene.word is not None:
            continue
        frame = np.ascontiguousarray(draw([scene])[0].permute(1, 2, 0).numpy())
        looked_at = shown(frame, example.prompt)
        assert looked_at.colors == {thing.color for thing in scene.things}
        assert looked_at.prompt_holds


def test_seen_prompts_have_nothing_held_out():
    chosen = seen_prompts(60, 3, 256, 256)
    assert [kind for kind, _ in chosen] == ["core"] * 36 + ["hard"] * 24
    assert not any(contains_held_out(example.scene) for _, example in chosen)
    assert seen_prompts(60, 3, 256, 256) == chosen != seen_prompts(60, 4, 256, 256)


def test_a_difference_has_the_published_interval():
    # Newcombe (1998), Interval estimation for the difference, table II, method 10: 56/70 - 48/80
    found = difference(48, 80, 56, 70)
    assert found["loss"] == pytest.approx(0.2)
    assert found["interval_95"] == pytest.approx([0.0524, 0.3339], abs=1e-4)


def test_held_out_prompts_are_compared_with_seen_ones_content_by_content():
    held_out = [trial("core", "one thing", shape=right) for right in (True, False)]
    held_out += [trial("core", "two things", shape=True)]
    seen = [trial("core", "one thing", shape=True)] * 3 + [trial("core", "two things", shape=False)]
    report = against_seen(held_out, [*seen, trial("hard", "a word", word=True)])
    assert set(report) == {"core"}
    core = report["core"]
    assert core["held_out"] == {"n": 3, "right": pytest.approx(2 / 3)}
    assert core["seen"] == {"n": 4, "right": 0.75}
    assert core["loss"] == pytest.approx(1 / 12)
    # One thing: 0.5 worse, twice; two things: 1 better, once.
    assert core["loss_of_same_mix"] == pytest.approx(0.0)
    assert core["by_content"]["one thing"]["seen"] == {"n": 3, "right": 1.0}


@pytest.mark.parametrize(
    ("arguments", "n", "seen"),
    [([], 500, 500), (["--negative"], 100, 100), (["--n", "7"], 7, 7), (["--seen", "0"], 500, 0)],
)
def test_as_many_seen_prompts_are_drawn_as_held_out_ones(arguments, n, seen):
    options = parse_arguments(arguments)
    assert (options.n, options.seen) == (n, seen)
