"""The measurement of the doors: its callers get pictures, and what it says of them is so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from websockets.sync.client import connect

from deployments.payloads import Pixels
from loadtest import door_clients
from loadtest.door_clients import Asked, Connection, DoorFailed
from loadtest.doors import HANDLE, empty_exchanges, measure, report_of
from tests.inprocess.served import Served
from tests.inprocess.stand_in_stages import STAMP, StandIn

ASKED = Asked("m", "a red circle", side=16, steps=4, guidance_scale=4.0)


def test_every_door_gives_the_picture_to_its_caller(server: Served, stages: StandIn):
    with (
        Connection(server.url) as connection,
        connect(door_clients.comfyui_messages_url(server.url)) as messages,
    ):
        callers = {
            HANDLE: door_clients.native(connection, ASKED),
            "openai": door_clients.openai(connection, ASKED),
            "comfyui": door_clients.comfyui(connection, messages, ASKED),
            "a1111": door_clients.a1111(connection, ASKED),
        }
        taken = measure(callers, rounds=2, warm_up=1)
        assert len(empty_exchanges(connection, 3)) == 3
    assert {name: len(seconds) for name, seconds in taken.items()} == dict.fromkeys(callers, 2)
    # All ask for the same: what differs is the job's id alone.
    jobs = {(job.width, job.num_inference_steps, job.sampler, job.seed) for job in stages.denoised}
    assert jobs == {(16, 4, "euler", seed) for seed in range(3)}


def test_pictures_that_differ_were_not_compared(server: Served, stages: StandIn, monkeypatch):
    made = iter(range(100))

    async def decode(latents: object) -> Pixels:
        return Pixels(np.full((16, 16, 3), next(made), np.uint8), STAMP)

    monkeypatch.setattr(stages, "_decode", decode)
    with Connection(server.url) as connection:
        native = door_clients.native(connection, ASKED)
        with pytest.raises(DoorFailed, match="Not the same picture"):
            measure({HANDLE: native, "native": native}, rounds=1, warm_up=0)


def test_a_door_that_fails_is_told(server: Served):
    with Connection(server.url) as connection:
        call = door_clients.openai(connection, replace(ASKED, side=2048))
        with pytest.raises(DoorFailed, match="HTTP 400"):
            call(0)


def test_the_cost_of_a_door_is_told_round_by_round():
    # The machine slows down half way: the difference within each round does not.
    handle = [0.050] * 10 + [0.500] * 10
    taken = {
        HANDLE: handle,
        "near": [s + 0.010 for s in handle],
        "far": [s + 0.016 for s in handle],
    }
    report = report_of(taken, [0.004] * 20)
    assert report["empty_exchange"]["median_ms"] == pytest.approx(4.0)
    assert report["doors"]["near"]["added_ms"] == pytest.approx(10.0, abs=0.01)
    assert report["doors"]["near"]["met"]
    assert not report["doors"]["far"]["met"]
    assert not report["ok"]
    low, high = report["doors"]["far"]["interval_95_ms"]
    assert low <= 16.0 <= high
