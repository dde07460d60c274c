"""Start-up makes forwards ready and measures them, and is never what stops a replica."""

from types import SimpleNamespace

import pytest
import torch

from deployments import warm_up as warm_up_module
from deployments.payloads import Path
from deployments.step_costs import TokenShape
from deployments.warm_up import warm_up
from serve.errors import ConfigurationError
from tests.unit.toy_engine import ToyModel


class Warmable(ToyModel):
    """Fails for memory from some rows on."""

    joint_attention_dim = 8
    pooled_projection_dim = 5
    largest_side = 64

    def __init__(self, most_rows: int) -> None:
        super().__init__()
        self.most_rows = most_rows
        self.prepared: list[tuple[int, int, int, int]] = []

    def prepare(self, height: int, width: int, text_tokens: int, rows: int) -> None:
        if rows > self.most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.prepared.append((height, width, text_tokens, rows))


def test_every_size_is_prepared_and_then_measured():
    model = Warmable(most_rows=99)
    warmed = warm_up(model, [(64, 32), (32, 32)], text_tokens=3, rows=(2, 1))
    assert model.prepared == [(4, 8, 3, 1), (4, 8, 3, 2), (4, 4, 3, 1), (4, 4, 3, 2)]
    for height, width, text_tokens, rows in model.prepared:
        assert warmed.costs.is_measured(TokenShape(height, width, text_tokens), rows)


def test_rows_that_find_no_memory_are_left_out():
    model = Warmable(most_rows=2)
    warmed = warm_up(model, [(64, 32), (32, 32)], text_tokens=3, rows=(1, 2, 4))
    assert len(model.prepared) == 4
    assert not warmed.costs.is_measured(TokenShape(4, 8, 3), 4)
    assert warmed.memory.capacity_bytes > 0


@pytest.mark.parametrize(
    ("power", "expected"),
    [(1.0, [1, 2, 4]), (0.5, [1, 2, 4, 8, 16, 32])],
    ids=["no gain", "a gain with every row"],
)
def test_start_up_stops_where_more_rows_gain_nothing(monkeypatch, power, expected):
    model = Warmable(most_rows=99)
    seconds = 0.0

    def spend(prompt_embeds: torch.Tensor) -> None:
        nonlocal seconds
        seconds += len(prompt_embeds) ** power

    model.before = spend
    clock = SimpleNamespace(perf_counter=lambda: seconds, monotonic=lambda: 0.0)
    monkeypatch.setattr(warm_up_module, "time", clock)
    warm_up(model, [(64, 32)], text_tokens=3, rows=(1, 2, 4, 8, 16, 32))
    assert [rows for *_, rows in model.prepared] == expected


def test_gains_too_small_alone_add_up(monkeypatch):
    model = Warmable(most_rows=99)
    seconds = 0.0

    def spend(prompt_embeds: torch.Tensor) -> None:
        nonlocal seconds
        rows = len(prompt_embeds)
        seconds += rows * 0.98**rows  # 2 % a row more

    model.before = spend
    clock = SimpleNamespace(perf_counter=lambda: seconds, monotonic=lambda: 0.0)
    monkeypatch.setattr(warm_up_module, "time", clock)
    warm_up(model, [(64, 32)], text_tokens=3, rows=range(1, 9))
    assert [rows for *_, rows in model.prepared] == [*range(1, 9)]


@pytest.mark.parametrize("rows", [(), (2, 4), (1, 2)])
def test_a_replica_without_memory_for_one_guided_picture_does_not_start(rows):
    with pytest.raises(ConfigurationError, match="one guided picture") as raised:
        warm_up(Warmable(most_rows=1), [(64, 32), (32, 32)], text_tokens=3, rows=rows)
    assert raised.value.value == "64x32"


def test_the_engine_is_told_how_many_rows_replay_a_graph():
    class Captures(Warmable):
        def path(
            self, height: int, width: int, text_tokens: int, rows: int, adapted: bool = False
        ) -> Path:
            return "graph" if (height, width, text_tokens, rows) in self.prepared else "eager"

    model = Captures(most_rows=3)
    warmed = warm_up(model, [(64, 32)], text_tokens=3, rows=(1, 2, 3, 4))
    assert warmed.prepared_rows == {TokenShape(4, 8, 3): 3}


def test_on_a_card_no_row_count_is_left_out():
    assert tuple(range(1, 17)) == warm_up_module._CUDA_ROWS
