"""Requests with LoRAs in the engine: who waits for whom, and what the model is told."""

import threading
from collections.abc import Iterator

import pytest

from deployments.engine import Engine
from deployments.lora_shelf import LoraShelf
from deployments.payloads import LoraUse
from serve.errors import ConfigurationError, InvalidRequest, JobCancelled
from tests.unit.test_lora_shelf import Arena, Files
from tests.unit.toy_engine import (
    ToyModel,
    everyone,
    failure,
    finished,
    job,
    submit,
)

INK, OIL = LoraUse("ink1", 0.5), LoraUse("oil2", -1.0)


class Loaded:
    """An engine with room for three pages, and the files it reads."""

    def __init__(self) -> None:
        self.model = ToyModel()
        self.files = Files()
        self.shelf = LoraShelf(Arena(3), self.files)
        self.engine = Engine(self.model, max_waiting=16, loras=self.shelf, policy=everyone)


@pytest.fixture
def loaded() -> Iterator[Loaded]:
    made = Loaded()
    yield made
    made.files.gate.set()
    made.engine.close()


def test_rows_are_told_their_pages_and_weights_and_rows_without_get_none(loaded):
    together = [submit(loaded.engine, job(value=1.0, loras=(INK, OIL)))[0]]
    for listener in together:
        finished(listener)
    (pages,) = {each for call in loaded.model.loras for each in call}
    assert [weight for _, weight in pages] == [0.5, -1.0, -1.0]
    loaded.model.loras.clear()
    finished(submit(loaded.engine, job(value=2.0))[0])
    assert set(loaded.model.loras) == {()}


def test_who_waits_for_a_file_holds_up_nobody_who_needs_none(loaded):
    loaded.files.gate.clear()
    waiting, _ = submit(loaded.engine, job(loras=(INK,), priority=5))
    for value in (1.0, 2.0):
        finished(submit(loaded.engine, job(value=value))[0])
    assert waiting.events.empty()
    loaded.files.gate.set()
    finished(waiting)


def test_a_request_that_finds_no_room_waits_until_others_are_done(loaded):
    reached, opened = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        reached.set()
        assert opened.wait(20)

    loaded.model.before = hold
    first, _ = submit(loaded.engine, job(value=1.0, loras=(OIL,)))
    assert reached.wait(20)
    second, _ = submit(loaded.engine, job(value=2.0, loras=(LoraUse("wax2", 1.0),)))
    opened.set()
    finished(first)
    finished(second)
    assert loaded.files.read_names == ["oil2", "wax2"]
    rows = [{weight for row in call for _, weight in row} for call in loaded.model.loras]
    assert {-1.0, 1.0} not in rows  # never both: there is room for one of them


def test_a_request_cancelled_while_it_waits_leaves_the_room_to_others(loaded):
    loaded.files.gate.clear()
    first, ticket = submit(loaded.engine, job(loras=(LoraUse("big3", 1.0),)))
    ticket.cancel()
    assert isinstance(failure(first), JobCancelled)
    second, _ = submit(loaded.engine, job(loras=(LoraUse("wax3", 1.0),)))
    loaded.files.gate.set()
    finished(second)


def test_a_file_that_fails_fails_its_request_alone(loaded):
    loaded.files.failing["ink1"] = ConfigurationError("ink1 is damaged")
    bad, _ = submit(loaded.engine, job(loras=(INK,)))
    good, _ = submit(loaded.engine, job(loras=(OIL,)))
    assert "damaged" in str(failure(bad))
    finished(good)


def test_without_room_loras_are_refused():
    engine = Engine(ToyModel(), max_waiting=1)
    try:
        with pytest.raises(InvalidRequest, match="no room for LoRAs"):
            submit(engine, job(loras=(INK,)))
    finally:
        engine.close()


def test_what_is_larger_than_the_room_is_refused_at_once(loaded):
    with pytest.raises(InvalidRequest, match="64 ranks together"):
        submit(loaded.engine, job(loras=(LoraUse("big4", 1.0),)))
