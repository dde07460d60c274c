"""Memory is admitted, not hoped for; and when it runs out all the same, nobody else pays."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from deployments import live_request
from deployments.engine import Engine
from deployments.job_size import live_bytes, token_shape
from deployments.memory_budget import GIB, MemoryBudget, ModelMemory
from deployments.payloads import Latents
from deployments.sd3.wire import from_wire
from serve.errors import InvalidRequest, StageFailed, StageUnavailable
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
    error = failure(submit(engine, job(negative=prompt(0)))[0])
    assert type(error) is StageFailed
    assert "Not even one request of this size fits" in str(error)
    assert card.failures == 3
    finished(submit(engine, SMALL)[0])
    assert engine.is_alive
    card.rows = 2
    finished(submit(engine, job(negative=prompt(0)))[0])


def test_beside_others_it_may_fit_elsewhere_and_they_go_on_in_between(start, model):
    engine = start()
    gate = Gate(model)
    first, _ = submit(engine, job(steps=1))
    gate.wait()
    big, _ = submit(engine, job(negative=prompt(0)))
    small, _ = submit(engine, job(steps=9, value=0.1))
    SmallCard(model, 1)
    gate.opened.set()
    finished(first)
    error = failure(big)
    assert type(error) is StageUnavailable
    finished(small)
    guided = [at for at, call in enumerate(model.calls) if call.rows > 1]
    # Twice it is tried after another's forward.
    assert len([at for at in guided if model.calls[at - 1].rows == 1]) >= 2
    assert engine.is_alive


@pytest.mark.parametrize("failures", [1, 2])
def test_memory_that_is_short_for_a_moment_costs_nobody_a_picture(start, model, failures):
    engine = start()
    left = failures

    def short_for_a_moment(prompt_embeds: torch.Tensor) -> None:
        nonlocal left
        if left:
            left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.before = short_for_a_moment
    np.testing.assert_array_equal(finished(submit(engine, SMALL)[0]).latents, alone(SMALL))


@pytest.mark.parametrize(("failures", "expected"), [(2, Latents), (3, StageFailed)])
def test_admission_waits_for_memory_a_few_times(start, monkeypatch, failures, expected):
    left, real = failures, from_wire

    def short_for_a_moment(*given: object) -> torch.Tensor:
        nonlocal left
        if left:
            left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(live_request, "from_wire", short_for_a_moment)
    engine = start()
    assert type(submit(engine, SMALL)[0].rest()[-1]) is expected
    assert engine.queue_length == 0
    finished(submit(engine, SMALL)[0])


def test_admission_beside_others_that_finds_no_memory_goes_elsewhere(start, model, monkeypatch):
    engine = start()
    gate = Gate(model)
    running, _ = submit(engine, job(steps=9))
    gate.wait()
    steps_before: list[int] = []

    def short(*given: object) -> torch.Tensor:
        steps_before.append(len(model.calls))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(live_request, "from_wire", short)
    waiting, _ = submit(engine, SMALL)
    gate.opened.set()
    assert type(failure(waiting)) is StageUnavailable
    finished(running)
    assert steps_before == [1, 2, 3]


def test_what_ran_out_is_tried_again_under_steady_load():
    budget, shape = MemoryBudget(1 << 40), token_shape(SMALL)
    budget.ran_out(shape, 4)
    assert budget.row_limit(shape, 0) == 3
    for _ in range(1000):
        budget.went_well()
    assert budget.row_limit(shape, 0) > 4


def test_what_runs_out_again_and_again_is_tried_ever_more_rarely():
    budget, shape = MemoryBudget(1 << 40), token_shape(SMALL)
    tries = 0
    for _ in range(4000):
        if budget.row_limit(shape, 0) >= 4:
            tries += 1
            budget.ran_out(shape, 4)
        else:
            budget.went_well()
    assert 2 <= tries <= 10


def test_a_neighbours_memory_is_waited_for_and_refuses_nothing():
    taken = 0
    unit = MemoryBudget(0, bytes_per_token=TOKEN_BYTES)
    capacity = 8 * holds() + forward(unit, 8)
    budget = MemoryBudget(capacity, bytes_per_token=TOKEN_BYTES, available=lambda: capacity - taken)
    model, shape = ModelMemory(4, torch.float32), token_shape(SMALL)
    budget.look(0)
    before = budget.row_limit(shape, 0)
    assert before >= 8
    taken = capacity - forward(unit, 2)
    budget.look(0)
    assert budget.row_limit(shape, 0) == 2
    assert budget.free_bytes(0) == forward(unit, 2)
    taken = capacity
    budget.look(0)
    budget.check(SMALL, model)
    taken = 0
    budget.look(0)
    assert budget.row_limit(shape, 0) == before


class Card:
    """What CUDA would say of a card, shared with a neighbour."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.total, self.free, self.allocated, self.fraction = 80 * GIB, 60 * GIB, 10 * GIB, 1.0
        answers = {
            "mem_get_info": lambda device: (self.free, self.total),
            "memory_allocated": lambda device: self.allocated,
            "memory_reserved": lambda device: self.allocated + GIB,  # of captured graphs
            "get_per_process_memory_fraction": lambda index: self.fraction,
            "current_device": lambda: 0,
            "empty_cache": lambda: None,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)


def test_a_cards_budget_keeps_to_the_allocators_limit(monkeypatch):
    card = Card(monkeypatch)
    card.fraction = 0.25
    budget = MemoryBudget.of_device(torch.device("cuda"))
    # 20 GiB less weights, graphs and half a GiB of margin.
    assert budget.capacity_bytes == 8.5 * GIB
    budget.look(0)
    assert budget.free_bytes(0) == 8.5 * GIB


def test_a_neighbours_load_at_start_up_makes_no_card_smaller_for_ever(monkeypatch):
    card = Card(monkeypatch)
    card.free = GIB
    budget = MemoryBudget.of_device(torch.device("cuda"))
    assert budget.capacity_bytes == 68.5 * GIB
    budget.look(0)
    assert budget.free_bytes(0) == 0.5 * GIB
    card.free = 60 * GIB
    budget.look(0)
    assert budget.free_bytes(0) == 59.5 * GIB


def test_the_card_is_asked_under_no_lock_that_submitting_needs(model):
    asking, answered = threading.Event(), threading.Event()
    armed = threading.Event()

    def slow() -> int:
        if armed.is_set():
            asking.set()
            assert answered.wait(20)
        return GIB

    engine = Engine(model, max_waiting=16, memory=MemoryBudget(GIB, available=slow))
    try:
        gate = Gate(model)
        listeners = [submit(engine, SMALL)[0]]
        gate.wait()
        armed.set()
        listeners.append(submit(engine, SMALL)[0])
        gate.opened.set()
        assert asking.wait(20)
        adding = threading.Thread(target=lambda: listeners.append(submit(engine, SMALL)[0]))
        adding.start()
        adding.join(20)
        assert not adding.is_alive()
        answered.set()
        for listener in listeners:
            finished(listener)
    finally:
        answered.set()
        engine.close()


def test_a_forward_takes_no_more_rows_than_were_prepared(model):
    engine = Engine(model, max_waiting=16, policy=everyone, prepared_rows={token_shape(SMALL): 3})
    try:
        gate = Gate(model)
        listeners = [submit(engine, SMALL)[0]]
        gate.wait()
        listeners += [submit(engine, SMALL)[0] for _ in range(8)]
        other = job(value=0.1, width=96)
        listeners += [submit(engine, other)[0] for _ in range(5)]
        gate.opened.set()
        for listener in listeners:
            finished(listener)
    finally:
        engine.close()
    rows = dict.fromkeys((8, 12), 0)
    for call in model.calls:
        rows[call.latents[-1]] = max(rows[call.latents[-1]], call.rows)
    assert rows == {8: 3, 12: 5}


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
