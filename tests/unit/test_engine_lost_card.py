"""A card that is lost or hangs ends the engine, and nobody's request for good."""

from collections.abc import Iterator

import pytest
import torch

from deployments import live_request
from deployments.engine import Engine
from deployments.live_request import LiveRequest
from deployments.sd3 import previews
from deployments.step_costs import StepCosts, TokenShape
from serve.errors import StageUnavailable
from tests.unit.toy_engine import (
    Clock,
    Gate,
    Listener,
    ToyModel,
    everyone,
    failure,
    job,
    one_at_a_time,
    submit,
)


@pytest.fixture
def model() -> ToyModel:
    return ToyModel()


@pytest.fixture
def engine(model: ToyModel) -> Iterator[Engine]:
    made = Engine(model, max_waiting=4, policy=one_at_a_time)
    yield made
    made.close()


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    ],
    ids=["accelerator", "library"],
)
def test_a_card_that_is_lost_closes_the_engine(engine, model, error):
    gate = Gate(model)
    running, waiting = submit(engine, job())[0], submit(engine, job())[0]
    gate.wait()

    def fail(prompt_embeds: torch.Tensor) -> None:
        raise error

    model.before = fail
    gate.opened.set()
    # Also the only one that ran: nobody can tell whose fault it was.
    assert isinstance(failure(running), StageUnavailable)
    # At once, so that nothing is taken that could only fail.
    assert not engine.is_alive
    with pytest.raises(StageUnavailable, match="CUDA error"):
        engine.check_health()
    assert isinstance(failure(waiting), StageUnavailable)
    with pytest.raises(StageUnavailable):
        engine.submit(job(), Listener())


@pytest.mark.parametrize("where", ["preview", "result", "admission"])
def test_a_card_that_is_lost_beside_a_forward_fails_nobody_for_good(model, monkeypatch, where):
    def lost(*given: object, **named: object) -> None:
        raise torch.AcceleratorError("CUDA error: device is lost")

    model.in_channels = 16
    engine = Engine(model, max_waiting=4, policy=everyone)
    try:
        gate = Gate(model)
        blocker, _ = submit(engine, job(steps=1))
        gate.wait()
        places = {
            "preview": (previews, "latents_to_rgb"),
            "result": (LiveRequest, "result"),
            "admission": (live_request, "from_wire"),
        }
        listeners = [submit(engine, job(steps=3, preview_every=1))[0] for _ in range(3)]
        monkeypatch.setattr(*places[where], lost)
        gate.opened.set()
        assert {type(failure(listener)) for listener in listeners} == {StageUnavailable}
        blocker.rest()
        assert "the GPU was lost: CUDA error: device is lost" in str(engine.ended_because)
    finally:
        engine.close()


def test_a_forward_that_never_ends_fails_health_and_the_card_is_not_asked(model, monkeypatch):
    def asked(device: torch.device) -> tuple[int, int]:
        raise AssertionError("asked while a forward runs")

    clock, costs = Clock(), StepCosts()
    costs.observe(TokenShape(4, 8, 3), 1, 2.0)
    engine = Engine(model, max_waiting=4, costs=costs, clock=clock)
    gate = Gate(model)
    try:
        running, _ = submit(engine, job())
        gate.wait()
        monkeypatch.setattr(torch.cuda, "mem_get_info", asked)
        monkeypatch.setattr(model, "device", torch.device("cuda"))
        clock.now += 100.0  # 20 x 2 s and a minute
        engine.check_health()
        clock.now += 1.0
        with pytest.raises(StageUnavailable, match="101 s"):
            engine.check_health()
        with pytest.raises(StageUnavailable):
            submit(engine, job())
        monkeypatch.setattr(model, "device", torch.device("cpu"))
    finally:
        gate.opened.set()
        engine.close()
    assert isinstance(failure(running), StageUnavailable)


def test_a_card_that_vanishes_while_nothing_runs_is_noticed(engine, model, monkeypatch):
    engine.check_health()

    def gone(device: torch.device) -> tuple[int, int]:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "mem_get_info", gone)
    model.device = torch.device("cuda")
    with pytest.raises(StageUnavailable, match="does not answer: CUDA error: unspecified") as one:
        engine.check_health()
    assert "Compile" not in str(one.value)
    with pytest.raises(StageUnavailable, match="does not answer"):
        submit(engine, job())
