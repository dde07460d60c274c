"""Memory is admitted, not hoped for; and when it runs out all the same, nobody else pays."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from deployments.engine import Engine
from deployments.live_request import live_bytes, token_shape
from deployments.memory_budget import MemoryBudget
from serve.errors import InvalidRequest, StageFailed
from tests.unit.toy_engine import (
    Gate,
    Listener,
    ToyModel,
    alone,
    everyone,
    failure,
    finished,
    job,
    prompt,
    submit,
)

SMALL = job(value=0.1)
TOKEN_BYTES = 1000.0


def holds(what: object = SMALL) -> int:
    return live_bytes(what, 4, torch.float32)  # type: ignore[arg-type]


def forward(budget: MemoryBudget, rows: int) -> int:
    return budget.forward_bytes(token_shape(SMALL), rows)


def budget_for(requests: float, rows: int) -> MemoryBudget:
    """Room for so many small requests and a forward of so many of their rows."""
    unit = MemoryBudget(0, bytes_per_token=TOKEN_BYTES)
    capacity = int(requests * holds()) + forward(unit, rows)
    return MemoryBudget(capacity, bytes_per_token=TOKEN_BYTES)


@pytest.fixture
def model() -> ToyModel:
    return ToyModel()


@pytest.fixture
def start(model: ToyModel) -> Iterator[Callable[[MemoryBudget | None], Engine]]:
    engines: list[Engine] = []

    def make(memory: MemoryBudget | None = None) -> Engine:
        engines.append(Engine(model, max_waiting=16, policy=everyone, memory=memory))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def test_what_can_never_fit_is_refused_by_name_with_what_would(start):
    engine = start(budget_for(2, rows=2))
    with pytest.raises(InvalidRequest, match="512x512") as raised:
        submit(engine, job(width=512, height=512))
    assert raised.value.field == "width"
    assert raised.value.value == "512x512"
    fits = str(raised.value.allowed)
    side = int(fits.split()[2].split("x")[0])
    assert side >= 32
    finished(submit(engine, job(width=side, height=side))[0])
    with pytest.raises(InvalidRequest):
        submit(engine, job(width=side + 16, height=side + 16))


def test_no_room_at_all_says_so(start):
    with pytest.raises(InvalidRequest) as raised:
        submit(start(MemoryBudget(100)), SMALL)
    assert "no size at all" in str(raised.value.allowed)


def test_what_fits_later_waits(start, model):
    # One row a forward at most, and room for two and a half requests.
    engine = start(budget_for(2.5, rows=2))
    gate = Gate(model)
    listeners = [submit(engine, SMALL)[0]]
    gate.wait()
    listeners += [submit(engine, SMALL)[0] for _ in range(4)]
    assert engine.stats().waiting_requests == 4
    live: list[int] = []

    def count(prompt_embeds: torch.Tensor) -> None:
        live.append(engine.stats().live_requests)

    model.before = count
    gate.opened.set()
    for listener in listeners:
        np.testing.assert_array_equal(finished(listener).latents, alone(SMALL))
    assert max(live) == 2
    assert max(call.rows for call in model.calls) == 2


def test_a_large_request_is_not_overtaken_for_ever(start, model):
    large = job(width=96, value=0.9)
    capacity = holds(large) + MemoryBudget(0, bytes_per_token=TOKEN_BYTES).forward_bytes(
        token_shape(large), 2
    )
    engine = start(MemoryBudget(capacity, bytes_per_token=TOKEN_BYTES))
    gate = Gate(model)
    listeners = [submit(engine, SMALL)[0]]
    gate.wait()
    listeners += [submit(engine, each)[0] for each in (large, SMALL, SMALL)]
    gate.opened.set()
    for listener in listeners:
        finished(listener)
    # There is room for three small ones together, but the large one came before two of them.
    assert [call.latents for call in model.calls] == [
        *[(1, 4, 4, 8)] * 4,
        *[(1, 4, 4, 12)] * 4,
        *[(2, 4, 4, 8)] * 4,
    ]


def test_a_forward_takes_no_more_rows_than_there_is_room_for(start, model):
    # Eight requests may live, but a forward has room for three rows.
    engine = start(budget_for(8, rows=3))
    gate = Gate(model)
    listeners = [submit(engine, job(steps=1))[0]]
    gate.wait()
    listeners += [submit(engine, SMALL)[0] for _ in range(7)]
    gate.opened.set()
    for listener in listeners:
        finished(listener)
    assert max(call.rows for call in model.calls) > 2
    assert max(call.rows for call in model.calls) <= 4  # those that finish leave a row room


class SmallCard:
    """Runs out of memory above some rows, as a card would that others share."""

    def __init__(self, model: ToyModel, rows: int) -> None:
        self.rows = rows
        self.failures = 0
        model.before = self

    def __call__(self, prompt_embeds: torch.Tensor) -> None:
        if len(prompt_embeds) > self.rows:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def crowd(engine: Engine, model: ToyModel, card_rows: int) -> tuple[SmallCard, list[Listener]]:
    gate = Gate(model)
    first, _ = submit(engine, job(steps=1))
    gate.wait()
    listeners = [submit(engine, SMALL)[0] for _ in range(8)]
    card = SmallCard(model, card_rows)
    gate.opened.set()
    finished(first)
    return card, listeners


@pytest.mark.parametrize("card_rows", [1, 3, 7])
def test_a_batch_that_does_not_fit_is_tried_with_fewer_rows_and_nobody_fails(
    start, model, card_rows
):
    card, listeners = crowd(start(), model, card_rows)
    for listener in listeners:
        np.testing.assert_array_equal(finished(listener).latents, alone(SMALL))
    # Halved until it fitted, and remembered after that.
    assert 1 <= card.failures <= 3


def test_only_one_alone_fails_for_memory_and_the_engine_goes_on(start, model):
    engine = start()
    card = SmallCard(model, 1)
    big, small = submit(engine, job(negative=prompt(0)))[0], submit(engine, SMALL)[0]
    error = failure(big)
    assert type(error) is StageFailed
    assert "Not even one request of this size fits" in str(error)
    finished(small)
    assert engine.is_alive
    card.rows = 2
    finished(submit(engine, job(negative=prompt(0)))[0])


def test_what_ran_out_is_forgotten_when_the_engine_was_idle(start, model):
    engine = start()
    _, listeners = crowd(engine, model, card_rows=1)
    for listener in listeners:
        finished(listener)
    model.before = lambda prompt_embeds: None
    model.calls.clear()
    _, listeners = crowd(engine, model, card_rows=99)
    for listener in listeners:
        finished(listener)
    assert max(call.rows for call in model.calls) == 8
