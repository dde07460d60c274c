"""What Serve says of models is waited for so long and no longer, however long Serve is away."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping

from serve.model_applications import ModelState
from serve.model_watch import ModelWatch

LOADED = {"pico-2": ModelState("loaded", 1.0)}


class Controller:
    """Of Serve; it can be away, and is then waited for."""

    def __init__(self) -> None:
        self.is_there = threading.Event()
        self.is_there.set()
        self.fails = False
        self.asked = 0

    def states(self) -> Mapping[str, ModelState]:
        self.asked += 1
        assert self.is_there.wait(30.0)
        if self.fails:
            raise RuntimeError("no controller")
        return LOADED


async def test_while_serve_is_away_what_it_said_last_holds_and_one_thread_waits_for_it():
    controller = Controller()
    watch = ModelWatch(controller.states, within_s=0.05)
    while not watch.states:  # on a busy machine 50 ms may be too few for a thread to start
        assert await watch.newest(0.0) in ({}, LOADED)
    controller.is_there.clear()
    asked = controller.asked
    began = time.monotonic()
    for _ in range(3):
        assert await watch.newest(0.0) == LOADED
    assert 0.15 <= time.monotonic() - began < 20.0
    assert controller.asked == asked + 1
    controller.fails = True
    controller.is_there.set()
    async with asyncio.timeout(20.0):
        while controller.asked == asked + 1:
            assert await watch.newest(0.0) == LOADED


async def test_an_answer_is_good_for_as_long_as_it_may_be_old():
    controller = Controller()
    watch = ModelWatch(controller.states)
    assert await watch.newest(60.0) == LOADED
    assert await watch.newest(60.0) == LOADED
    assert controller.asked == 1
    watch.forget()
    assert await watch.newest(60.0) == LOADED
    assert controller.asked == 2
