"""A stage's replica is killed while it works: the job goes on elsewhere, with the same picture."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from tests.ray.events import following
from tests.ray.world import World, wait_until

LONG = {"prompt": "a green star", "num_inference_steps": 100, "num_images": 2, "seed": 3}


def test_a_job_survives_the_death_of_its_denoiser(world: World):
    stage = "denoise"
    undisturbed = world.generate(**LONG)
    wait_until(lambda: len(world.replicas(stage)) == 2)
    assert not any(replica["queue_length"] for replica in world.replicas(stage))
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


@pytest.mark.parametrize("stage", ["text", "decode"])
def test_requests_right_after_a_death_succeed(world: World, stage: str):
    wait_until(lambda: len(world.replicas(stage)) == 2)
    victim = world.replicas(stage)[0]
    os.kill(victim["pid"], signal.SIGKILL)
    # The router may still choose the dead one; no caller may notice.
    for number in range(6):
        result = world.generate(prompt=f"after the death of {stage}, picture {number}")
        assert victim["pid"] not in {report["pid"] for report in result["stages"]}
    wait_until(lambda: len({r["pid"] for r in world.replicas(stage)} - {victim["pid"]}) == 2)
