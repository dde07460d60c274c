"""A minute of chaos: every kind of process is killed, the store goes away, and no job notices."""

from __future__ import annotations

import asyncio
import random
import time

from loadtest.chaos import Run, undisturbed_pictures, verdict
from tests.ray.world import World, wait_until

JOBS = 40


def test_no_job_is_lost_doubled_or_changed_by_chaos(world: World):
    from ray._private.worker import _global_node

    assert world.kelvin is not None
    assert _global_node is not None
    undisturbed = undisturbed_pictures(world.kelvin.url)
    session = str(_global_node.get_session_dir_path())
    run = Run(world.kelvin, world.store, session, random.Random(1), began=time.monotonic())
    asyncio.run(run.work(JOBS, at_once=6, every_s=3.0))
    found = verdict(run, JOBS, undisturbed)
    assert found["ok"], found
    assert sum(found["struck"].values()) >= 4, found
    wait_until(lambda: world.http.get("/readyz").status_code == 200)
    for stage in ("text", "denoise", "decode"):
        wait_until(lambda stage=stage: len(world.replicas(stage)) == 2)  # type: ignore[misc]
