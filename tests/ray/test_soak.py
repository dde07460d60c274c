"""Minutes of mixed work while replicas are killed: every accepted job ends, and rightly.

Slow; run by `make test-slow`.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import pytest

from loadtest.soak import mixed_request
from tests.ray.world import World, wait_until

SOAK_S = 180.0
BETWEEN_DEATHS_S = 30.0
AT_ONCE = 6
STAGES = ("text", "denoise", "decode")


def _one_job(world: World, number: int) -> tuple[bool, dict[str, Any]]:
    """Submit a job, cancel some, and return whether it was cancelled and its last record."""
    rng = random.Random(number)
    job_id = world.submit(**mixed_request(number))
    cancelled = rng.random() < 0.2 and world.http.delete(f"/v1/jobs/{job_id}").status_code == 200
    record: dict[str, Any] = {}

    def has_ended() -> bool:
        record.update(world.http.get(f"/v1/jobs/{job_id}").json())
        return record["status"] in ("succeeded", "failed", "cancelled")

    wait_until(has_ended)
    return cancelled, record


def _all_replicas(world: World, stage: str) -> list[dict[str, Any]]:
    """Wait until Serve has replaced the dead, so that a death never finds a stage empty."""
    found: list[dict[str, Any]] = []

    def are_two() -> bool:
        found[:] = world.replicas(stage)
        return len(found) == 2

    wait_until(are_two)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_accepted_job_ends_while_replicas_die(world: World):
    numbers = itertools.count()
    end = time.monotonic() + SOAK_S
    next_death = time.monotonic() + BETWEEN_DEATHS_S
    victims = itertools.cycle(STAGES)
    done: list[tuple[bool, dict[str, Any]]] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running: set[Future[tuple[bool, dict[str, Any]]]] = set()
        while time.monotonic() < end:
            while len(running) < AT_ONCE:
                running.add(pool.submit(_one_job, world, next(numbers)))
            finished, running = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            done += [future.result() for future in finished]
            if time.monotonic() > next_death:
                os.kill(_all_replicas(world, next(victims))[0]["pid"], signal.SIGKILL)
                next_death = time.monotonic() + BETWEEN_DEATHS_S
        done += [future.result() for future in running]
    assert len(done) > AT_ONCE
    wrong = [
        record
        for cancelled, record in done
        if record["status"] != ("cancelled" if cancelled else "succeeded")
    ]
    assert not wrong, wrong[:3]
    for stage in STAGES:
        assert not any(replica["queue_length"] for replica in _all_replicas(world, stage))
