"""A stage's replica is killed while it works: the job goes on elsewhere, with the same picture."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from tests.ray.events import following
from tests.ray.world import World, wait_until

LONG = {"prompt": "a green star", "num_inference_steps": 100, "num_images": 2, "seed": 3}


@pytest.mark.parametrize("stage", ["denoise"])
def test_a_job_survives_the_death_of_a_replica(world: World, stage: str):
    undisturbed = world.generate(**LONG)
    wait_until(lambda: len(world.replicas(stage)) == 2)
    victims = {replica["pid"] for replica in world.replicas(stage)}
    busy = [replica for replica in world.replicas(stage) if replica["queue_length"]]
    assert not busy
    job_id = world.submit(**LONG)
    with following(world.http, job_id) as events:
        next(event for event in events if event["event"] == "step")
        working = [replica for replica in world.replicas(stage) if replica["queue_length"]]
        assert working
        os.kill(working[0]["pid"], signal.SIGKILL)
        *_, last = events
    assert last["event"] == "stored", last
    finishers = {r["pid"] for r in last["result"]["stages"] if r["stage"] == stage}
    assert working[0]["pid"] not in finishers
    for index in range(2):
        np.testing.assert_array_equal(
            world.pixels(last["result"], index), world.pixels(undisturbed, index)
        )
    # Serve puts a new process in its place.
    wait_until(lambda: len({r["pid"] for r in world.replicas(stage)} - {working[0]["pid"]}) == 2)
    assert {replica["pid"] for replica in world.replicas(stage)} != victims
