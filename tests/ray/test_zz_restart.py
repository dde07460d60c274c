"""Everything is stopped and started again; runs last, for it costs a whole start."""

from __future__ import annotations

import subprocess

import numpy as np

from tests.ray.world import World


def processes_below(session_folder: str) -> list[str]:
    listing = subprocess.run(
        ["ps", "-eww", "-o", "args"], capture_output=True, text=True, check=True
    )
    return [line for line in listing.stdout.splitlines() if session_folder in line]


def test_a_restart_changes_no_pixel_and_loses_no_job(world: World):
    from ray._private.worker import _global_node

    before = world.generate(num_inference_steps=4, prompt="a yellow ring")
    pixels = world.pixels(before)
    assert _global_node is not None
    session = str(_global_node.get_session_dir_path())
    assert processes_below(session)
    world.stop()
    assert processes_below(session) == []

    # With a further model now, which an operator wrote into the settings.
    world.start(replicas=1, models=[{"model": {"path": "pico", "name": "second"}}])
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
