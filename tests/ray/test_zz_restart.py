"""Everything is stopped and started again; the last on the usual Kelvin, for it leaves another."""

from __future__ import annotations

import os
import subprocess

import numpy as np

from loadtest.chaos_victims import kill_head
from tests.ray.world import World, wait_until


def processes_below(session_folder: str) -> dict[int, str]:
    """Return process id -> command line."""
    listing = subprocess.run(
        ["ps", "-eww", "-o", "pid=,args="], capture_output=True, text=True, check=True
    )
    found = (line.split(maxsplit=1) for line in listing.stdout.splitlines())
    return {int(pid): command for pid, command in found if session_folder in command}


def test_the_head_is_killed_and_started_again(world: World):
    from ray._private.worker import _global_node

    before = world.generate(num_inference_steps=4, prompt="a yellow ring")
    pixels = world.pixels(before)
    assert _global_node is not None
    session = str(_global_node.get_session_dir_path())
    assert processes_below(session)
    # More work than is done before the end.
    jobs = {seed: world.submit(num_inference_steps=100, seed=seed) for seed in range(8)}
    kill_head(session, owner=os.getpid())
    world.stop()
    # On a busy machine they take a moment to be gone after they were killed.
    wait_until(lambda: processes_below(session) == {}, within_s=30)

    # With a further model now, which an operator wrote into the settings.
    world.start(replicas=1, models=[{"model": {"path": "pico", "name": "second"}}])

    def ended(job_id: str) -> bool:
        return bool(world.http.get(f"/v1/jobs/{job_id}").json()["status"] == "succeeded")

    wait_until(lambda: all(map(ended, jobs.values())), within_s=120)
    for seed in (0, 7):
        taken_over = world.http.get(f"/v1/jobs/{jobs[seed]}").json()["result"]
        undisturbed = world.generate(num_inference_steps=100, seed=seed)
        np.testing.assert_array_equal(world.pixels(taken_over), world.pixels(undisturbed))
    record = world.http.get(f"/v1/jobs/{before['id']}").json()
    assert record["status"] == "succeeded"
    assert record["request"] == before["request"]
    np.testing.assert_array_equal(world.pixels(record["result"]), pixels)
    after = world.http.post("/v1/generate", json=before["request"]).json()
    replicas = {report["replica"] for report in before["stages"]}
    assert replicas.isdisjoint(report["replica"] for report in after["stages"])
    np.testing.assert_array_equal(world.pixels(after), pixels)
    second = world.generate(model="second", num_inference_steps=4, prompt="a yellow ring")
    denoisers = {world.http.get("/v1/status").json()["stages"]["denoise"][0]["pid"]}
    assert denoisers.isdisjoint(report["pid"] for report in second["stages"])
    np.testing.assert_array_equal(world.pixels(second), pixels)
