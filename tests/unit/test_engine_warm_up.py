"""Start-up makes forwards ready, steps and measures them; what could not step is not ready."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deployments import forward
from deployments import warm_up as warm_up_module
from deployments.forward import Stepped
from deployments.live_request import LiveRequest
from deployments.payloads import Path
from deployments.step_costs import TokenShape
from deployments.warm_up import warm_up
from serve.errors import ConfigurationError, StageFailed
from tests.unit.toy_engine import ToyModel


class Warmable(ToyModel):
    """Has no memory for forwards of more rows or latents, or else to make more rows ready."""

    joint_attention_dim = 8
    pooled_projection_dim = 5
    largest_side = 64

    def __init__(self, most_rows: int = 99, most_latents: int = 9999, ready: int = 99) -> None:
        super().__init__()
        self.most_rows = most_rows
        self.most_latents = most_latents
        self.ready = ready
        self.prepared: list[tuple[int, int, int, int]] = []

    def prepare(self, height: int, width: int, text_tokens: int, rows: int) -> None:
        self._take_memory(rows if rows <= self.ready else 100, height * width)
        self.prepared.append((height, width, text_tokens, rows))

    def velocity(self, latents: torch.Tensor, *others: Any) -> torch.Tensor:
        self._take_memory(len(latents), latents[0, 0].numel())
        return super().velocity(latents, *others)

    def _take_memory(self, rows: int, latents: int) -> None:
        if rows > self.most_rows or latents > self.most_latents:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    @property
    def buckets(self) -> set[tuple[int, int, int]]:
        """Height, width and rows of all forwards."""
        return {(*call.latents[2:], call.rows) for call in self.calls}  # type: ignore[misc]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TokenShape, list[float]]]:
    """Shape and guidance scales of each step of start-up."""
    seen: list[tuple[TokenShape, list[float]]] = []

    def step_together(model: ToyModel, chosen: Sequence[LiveRequest]) -> list[Stepped | Exception]:
        stepped = forward.step_together(model, chosen)
        seen.append((chosen[0].shape, [each.ticket.job.guidance_scale for each in chosen]))
        return stepped

    monkeypatch.setattr("deployments.warm_step.step_together", step_together)
    return seen


def takes(model: ToyModel, monkeypatch: pytest.MonkeyPatch, seconds_of: Callable[[int], float]):
    """Let forwards take so long by their rows."""
    now = 0.0

    def spend(prompt_embeds: torch.Tensor) -> None:
        nonlocal now
        now += seconds_of(len(prompt_embeds))

    model.before = spend
    clock = SimpleNamespace(perf_counter=lambda: now, monotonic=lambda: now)
    monkeypatch.setattr(warm_up_module, "time", clock)


def test_every_size_is_prepared_and_then_measured():
    model = Warmable()
    warmed = warm_up(model, [(64, 32), (32, 32)], text_tokens=3, rows=(2, 1))
    assert model.prepared == [(4, 8, 3, 1), (4, 8, 3, 2), (4, 4, 3, 1), (4, 4, 3, 2)]
    for height, width, text_tokens, rows in model.prepared:
        assert warmed.costs.is_measured(TokenShape(height, width, text_tokens), rows)


@pytest.mark.parametrize("rows", [(3, 8), ()])
def test_a_step_is_made_of_every_bucket_that_was_set_and_of_each_kind_however_long_it_takes(
    monkeypatch, steps, rows
):
    model = Warmable()
    takes(model, monkeypatch, lambda rows: 100.0 * rows)
    warm_up(model, [(64, 32), (32, 32)], text_tokens=3, rows=rows)
    guided, unguided = 4.0, 1.0
    kinds = [[unguided], [guided]]
    many = [[guided, unguided], [guided] * 4] if rows else []
    sizes = (TokenShape(4, 8, 3), TokenShape(4, 4, 3))
    assert steps == [(size, scales) for size in sizes for scales in (*kinds, *many)]
    assert model.buckets == {(4, width, each) for width in (8, 4) for each in (1, 2, *rows)}


def test_what_cannot_be_made_ready_is_stepped_as_it_is(steps):
    model = Warmable(ready=0)
    warmed = warm_up(model, [(64, 32)], text_tokens=3)
    assert model.prepared == []
    assert [scales for _, scales in steps] == [[1.0], [4.0]]
    assert not warmed.costs.is_measured(TokenShape(4, 8, 3), 2)


def test_weights_that_make_no_finite_step_are_not_ready():
    class Broken(Warmable):
        def velocity(self, *inputs: Any) -> torch.Tensor:
            return super().velocity(*inputs) * float("nan")

    with pytest.raises(StageFailed, match="NaN"):
        warm_up(Broken(), [(64, 32)], text_tokens=3)


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
    model = Warmable()
    monkeypatch.setattr(warm_up_module, "_CPU_ROWS", (1, 2, 4, 8, 16, 32))
    takes(model, monkeypatch, lambda rows: 1e-3 * rows**power)
    warm_up(model, [(64, 32)], text_tokens=3)
    assert [rows for *_, rows in model.prepared] == expected


def test_start_up_stops_on_a_cpu_when_it_has_taken_long(monkeypatch):
    model = Warmable()
    monkeypatch.setattr(warm_up_module, "_CPU_ROWS", (1, 2, 4, 8, 16, 32))
    takes(model, monkeypatch, lambda rows: 0.3 * rows**0.5)
    warm_up(model, [(64, 32)], text_tokens=3)
    assert [rows for *_, rows in model.prepared] == [1, 2, 4]


def test_on_a_cpu_that_starts_others_what_counts_is_the_least_that_forwards_took(monkeypatch):
    model, forwards = Warmable(), 0

    def seconds_of(rows: int) -> float:
        nonlocal forwards
        forwards += 1
        return float(1e-3 * rows**0.5 * (1 if forwards % 4 == 0 else 6))

    takes(model, monkeypatch, seconds_of)
    costs = warm_up(model, [(64, 32)], text_tokens=3).costs
    shape = TokenShape(4, 8, 3)
    assert costs.seconds(shape, 2) == pytest.approx(1e-3 * 2**0.5)
    assert costs.seconds(shape, 4) == pytest.approx(2e-3)


def test_gains_too_small_alone_add_up(monkeypatch):
    model = Warmable()
    monkeypatch.setattr(warm_up_module, "_CPU_ROWS", range(1, 9))
    takes(model, monkeypatch, lambda rows: 1e-3 * rows * 0.98**rows)  # 2 % a row more
    warm_up(model, [(64, 32)], text_tokens=3)
    assert [rows for *_, rows in model.prepared] == [*range(1, 9)]


@pytest.mark.parametrize("rows", [(), (2, 4), (1, 2)])
def test_a_replica_without_memory_for_one_guided_picture_does_not_start(rows):
    with pytest.raises(ConfigurationError, match="one guided picture") as raised:
        warm_up(Warmable(most_rows=1), [(64, 32), (32, 32)], text_tokens=3, rows=rows)
    assert raised.value.value == "64x32"


def test_nor_does_one_without_memory_for_one_of_its_sizes():
    with pytest.raises(ConfigurationError, match="one guided picture") as raised:
        warm_up(Warmable(most_latents=4 * 8), [(32, 32), (64, 64)], text_tokens=3)
    assert raised.value.value == "64x64"


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
