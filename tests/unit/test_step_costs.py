"""What forwards cost: measured, guessed between measurements, read back from a file."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.step_costs import StepCosts, TokenShape
from loadtest.cost_files import RECORDED, read_recording, write_recording
from serve.errors import ConfigurationError

SMALL, LARGE = TokenShape(64, 64, 333), TokenShape(128, 128, 333)
BETWEEN = TokenShape(96, 96, 333)

shapes = st.builds(TokenShape, st.integers(1, 96), st.integers(1, 96), st.just(333)).map(
    lambda shape: TokenShape(shape.height * 2, shape.width * 2, shape.text_tokens)
)
measurements = st.lists(
    st.tuples(shapes, st.integers(1, 32), st.floats(1e-4, 10)), min_size=1, max_size=12
)


def costs(*entries: tuple[TokenShape, int, float]) -> StepCosts:
    made = StepCosts()
    for entry in entries:
        made.observe(*entry)
    return made


def test_tokens_are_patches_and_text() -> None:
    assert LARGE.tokens == 4096 + 333


def test_without_measurements_batching_gains_nothing() -> None:
    nothing = StepCosts()
    alone = nothing.seconds(SMALL, 1)
    assert nothing.seconds(SMALL, 8) == pytest.approx(8 * alone)
    assert nothing.seconds(LARGE, 1) / alone == pytest.approx(LARGE.tokens / SMALL.tokens)
    assert nothing.prices(SMALL, 4) == pytest.approx([alone] * 4)


def test_rows_between_measured_ones_are_interpolated_and_more_go_on() -> None:
    known = costs((SMALL, 2, 0.10), (SMALL, 4, 0.14), (SMALL, 8, 0.30))
    assert known.seconds(SMALL, 2) == 0.10
    assert known.seconds(SMALL, 3) == pytest.approx(0.12)
    assert known.seconds(SMALL, 1) == pytest.approx(0.08)
    assert known.seconds(SMALL, 10) == pytest.approx(0.38)


def test_more_rows_than_measured_get_no_better_price() -> None:
    known = costs((SMALL, 2, 0.10), (SMALL, 4, 0.10))
    assert known.seconds(SMALL, 8) == pytest.approx(0.20)


def test_a_shape_between_two_lies_between_them() -> None:
    known = costs((SMALL, 2, 0.03), (LARGE, 2, 0.10))
    share = (BETWEEN.tokens - SMALL.tokens) / (LARGE.tokens - SMALL.tokens)
    assert known.seconds(BETWEEN, 2) == pytest.approx(0.03 + 0.07 * share)


def test_a_larger_shape_counts_as_more_rows_of_the_largest() -> None:
    known = costs((SMALL, 1, 0.02), (SMALL, 8, 0.09))
    rows = LARGE.tokens / SMALL.tokens
    assert known.seconds(LARGE, 1) == pytest.approx(0.02 + (rows - 1) * 0.01)


def test_one_outlier_moves_nothing_and_a_lasting_change_does() -> None:
    known = costs(*[(SMALL, 2, 0.1)] * 5)
    known.observe(SMALL, 2, 3.0)
    assert known.seconds(SMALL, 2) == 0.1
    for _ in range(9):
        known.observe(SMALL, 2, 0.2)
    assert known.seconds(SMALL, 2) == 0.2
    assert known.prices(SMALL, 2)[1] == 0.1


@pytest.mark.parametrize(("rows", "seconds"), [(0, 0.1), (2, 0.0), (2, float("nan"))])
def test_what_cannot_be_is_refused(rows: int, seconds: float) -> None:
    with pytest.raises(ValueError, match="cannot be"):
        StepCosts().observe(SMALL, rows, seconds)


def test_no_rows_have_no_cost() -> None:
    with pytest.raises(ValueError, match="cannot be"):
        costs((SMALL, 2, 0.1)).seconds(SMALL, 0)


@given(measurements, shapes, st.integers(1, 40))
def test_every_guess_is_positive(
    entries: list[tuple[TokenShape, int, float]], shape: TokenShape, rows: int
) -> None:
    assert costs(*entries).seconds(shape, rows) > 0


@given(measurements, shapes, st.integers(1, 40))
def test_json_keeps_what_is_known(
    entries: list[tuple[TokenShape, int, float]], shape: TokenShape, rows: int
) -> None:
    known = costs(*entries)
    again = StepCosts.from_json(json.loads(json.dumps(known.as_json())))
    assert again.seconds(shape, rows) == known.seconds(shape, rows)


@pytest.mark.parametrize(
    "recorded", [{}, {"costs": [{"rows": 2}]}, {"costs": 3}, {"costs": [{**{}, "height": "x"}]}]
)
def test_what_is_no_recording_is_refused(recorded: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="no recording"):
        StepCosts.from_json(recorded)


def test_recordings_stand_side_by_side_in_a_file(tmp_path) -> None:
    path = tmp_path / "made" / "costs.json"
    write_recording(path, "large", costs((LARGE, 2, 0.1)), {"device": "one"})
    write_recording(path, "medium", costs((SMALL, 2, 0.2)), {"device": "two"})
    write_recording(path, "large", costs((LARGE, 2, 0.3)), {"device": "three"})
    known, told = read_recording(path, "large")
    assert (known.seconds(LARGE, 2), told) == (0.3, {"device": "three"})
    assert read_recording(path, "medium")[1] == {"device": "two"}
    with pytest.raises(ConfigurationError, match="pico"):
        read_recording(path, "pico")
    with pytest.raises(ConfigurationError):
        read_recording(tmp_path / "none.json", "large")


@pytest.mark.parametrize("model", ["large", "medium"])
def test_the_shipped_recording_says_where_it_comes_from(model: str) -> None:
    known, told = read_recording(RECORDED, model)
    assert {"device", "torch", "command", "date", "source"} <= set(told)
    assert "H100" in told["device"]
    # Anything else would be a recording of something other than these forwards.
    assert known.seconds(SMALL, 2) < known.seconds(LARGE, 2) < known.seconds(LARGE, 8)


def test_counts_that_were_timed_in_turns_keep_their_proportion_until_they_are_observed():
    costs = StepCosts()
    costs.observe_in_proportion(SMALL, {1: 3.0, 2: 4.0, 4: 6.0})
    assert [costs.seconds(SMALL, rows) for rows in (1, 2, 4)] == [3, 4, 6]
    assert all(costs.is_measured(SMALL, rows) for rows in (1, 2, 4))
    costs.observe(SMALL, 2, 0.4)
    assert [costs.seconds(SMALL, rows) for rows in (1, 2, 4)] == pytest.approx([0.3, 0.4, 0.6])
    costs.observe(SMALL, 4, 1.0)
    assert costs.seconds(SMALL, 4) == 1.0
    assert StepCosts.from_json(costs.as_json()).seconds(SMALL, 4) == 1.0


@pytest.mark.parametrize("wrong", [{0: 1.0}, {1: 0.0}, {1: math.nan}, {1: math.inf}])
def test_proportions_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="cannot take so long"):
        StepCosts().observe_in_proportion(SMALL, wrong)
