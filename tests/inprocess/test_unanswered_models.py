"""Serve, asked for a model that it says is loaded, may not answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from ray import serve

from serve import served_models
from serve.config import StorageSettings
from serve.errors import StageUnavailable
from serve.model_applications import ModelState
from serve.pipeline_identity import PipelineIdentity
from tests.inprocess.stand_in_stages import REQUEST, StandIn, new_pipeline


class Controller:
    """Of Serve; whoever asks it for a handle waits until it is back, and there is none then."""

    def __init__(self) -> None:
        self.is_back = threading.Event()
        self.asked = 0

    def get_app_handle(self, application: str) -> None:
        self.asked += 1
        assert self.is_back.wait(30.0)
        raise RuntimeError(f"no {application}")


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    controller = Controller()
    states = {name: ModelState("loaded", 1.0) for name in ("further", "another")}
    monkeypatch.setattr(served_models, "model_states", lambda _: states)
    monkeypatch.setattr(serve, "get_app_handle", controller.get_app_handle)
    monkeypatch.setattr(served_models, "_CARD_ANSWERS_WITHIN_S", 0.1)
    yield controller
    controller.is_back.set()


async def test_a_model_that_does_not_answer_is_not_waited_for(
    controller: Controller, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    pipeline = new_pipeline(StandIn(), storage, monkeypatch)
    monkeypatch.setattr(pipeline._models, "_identity", PipelineIdentity("p", 1, "n", "kelvin"))
    asked = REQUEST.model_copy(update={"model": "further"})

    async def refused() -> None:
        with pytest.raises(StageUnavailable, match="'further' cannot be reached"):
            await pipeline.generate(asked)

    async with asyncio.timeout(20.0):
        for _ in range(3):
            await asyncio.gather(refused(), refused())
        assert controller.asked == 1, "one thread waits"
        states = {model["name"]: model["state"] for model in await pipeline.models()}
        assert states == {"m": "loaded", "further": "failed", "another": "failed"}
        controller.is_back.set()
        while controller.asked == 2:
            await refused()
