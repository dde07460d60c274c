"""A stage's replica is killed while it works: the job goes on elsewhere, with the same picture."""

from __future__ import annotations

import os
import signal
from typing import Any

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


def test_what_kills_its_replica_again_and_again_is_parked_and_nothing_else_is(world: World):
    wait_until(lambda: len(world.replicas("denoise")) == 2)
    poison = world.submit(num_inference_steps=200, num_images=1, seed=4)
    killed: list[int] = []

    def working() -> list[dict[str, Any]]:
        return [replica for replica in world.replicas("denoise") if replica["queue_length"]]

    def record(job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = world.http.get(f"/v1/jobs/{job_id}").json()
        return found

    while record(poison)["status"] in ("pending", "running"):
        assert len(killed) < 4
        wait_until(lambda: bool(working()) or record(poison)["status"] == "failed")
        for replica in working()[:1]:
            # As its work would: the process is gone from one moment to the next.
            os.kill(replica["pid"], signal.SIGKILL)
            killed.append(replica["pid"])
            pid = replica["pid"]
            wait_until(lambda pid=pid: pid not in {r["pid"] for r in world.replicas("denoise")})  # type: ignore[misc]
    ended = record(poison)
    assert ended["error"]["error"]["type"] == "StageFailed"
    assert "alone" in ended["error"]["error"]["message"]
    # Once in company, as far as anybody knew, and twice alone.
    assert len(killed) == 3
    wait_until(lambda: len(world.replicas("denoise")) == 2)
    innocent = world.submit(**LONG)
    wait_until(lambda: record(innocent)["status"] == "succeeded")
