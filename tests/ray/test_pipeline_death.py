"""The Pipeline is killed while it works: what it had accepted is finished by the next one."""

from __future__ import annotations

import os
import signal

import httpx
import numpy as np

from tests.ray.world import World, wait_until

LONG = {"prompt": "a green star", "num_inference_steps": 60, "num_images": 2}


def test_accepted_jobs_survive_the_death_of_their_pipeline(world: World):
    jobs = [world.submit(**LONG, seed=seed) for seed in range(6)]
    cancelled = world.submit(**LONG, seed=9)
    victim = world.http.get("/v1/status").json()["pipeline"]["pid"]
    os.kill(victim, signal.SIGKILL)

    def answered(method: str, job_id: str) -> str:
        try:
            answer = world.http.request(method, f"/v1/jobs/{job_id}")
        except httpx.TransportError:
            return "no answer"
        # Until Serve has started another Pipeline its proxy answers by itself.
        return str(answer.json()["status"]) if answer.status_code == 200 else "no answer"

    wait_until(lambda: answered("DELETE", cancelled) == "cancelled")
    for job_id in jobs:
        wait_until(lambda job_id=job_id: answered("GET", job_id) == "succeeded", within_s=120)  # type: ignore[misc]
    assert answered("GET", cancelled) == "cancelled"
    assert world.http.get("/v1/status").json()["pipeline"]["pid"] != victim
    again = world.generate(**LONG, seed=3)
    before = world.http.get(f"/v1/jobs/{jobs[3]}").json()["result"]
    for index in range(2):
        np.testing.assert_array_equal(world.pixels(before, index), world.pixels(again, index))
