"""A minute of chaos: every kind of process is killed, the store goes away, and no job notices."""

from __future__ import annotations

import pytest

from loadtest.chaos_attack import Target
from loadtest.chaos_nodes import WorkerNodes
from loadtest.chaos_run import chaos
from loadtest.chaos_victims import KINDS
from tests.ray.world import World, wait_until

JOBS = 40
# The head's turn comes in test_zz_restart.py.
HURT = tuple(kind for kind in KINDS if kind != "head")


@pytest.mark.timeout(480)
def test_no_job_is_lost_doubled_or_changed_by_chaos(world: World):
    assert world.kelvin is not None
    with WorkerNodes(1, num_cpus=3) as nodes:
        target = Target(world.kelvin, world.store, nodes)
        found = chaos(target, JOBS, at_once=6, rounds=1, kinds=HURT, seed=1, limit_s=200.0)
    assert found["ok"], found
    # What was on the node that is gone starts elsewhere; those who come next find all in place.
    for stage in ("text", "denoise", "decode"):
        wait_until(lambda stage=stage: len(world.replicas(stage)) == 2, within_s=150)  # type: ignore[misc]
    wait_until(lambda: world.http.get("/readyz").status_code == 200)
