"""A minute of chaos: every kind of process is killed, the store goes away, and no job notices.

The whole of it, with a head that is killed, is slow; run by `make test-slow`.
"""

from __future__ import annotations

import json
import subprocess
import sys

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


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_hundred_jobs_on_several_nodes_and_a_head_that_is_killed():
    run = subprocess.run(
        [sys.executable, "-m", "loadtest.chaos", "--jobs", "300", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["ok"], found
    assert min(found["struck"].values()) >= 2
