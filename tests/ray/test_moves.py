"""A picture under way goes on in another replica, from where it was, and is the same picture.

The cards are rehearsed ones (`hot_cards`), whose steps take an eighth of a second: so that a step
can be seen before the next one is done.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray

from tests.ray.events import following
from tests.ray.hot_cards import HeatScript
from tests.ray.world import World, wait_until

pytestmark = pytest.mark.own_kelvin

STEPS = 20
AT_STEP = 15
EVERY = 5
JOB = {"prompt": "a green star", "num_inference_steps": STEPS, "sampler": "dpmpp_2m_sde", "seed": 3}


@pytest.fixture(scope="module")
def slow_world(any_world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    script = HeatScript(tmp_path_factory.mktemp("heat"))
    thermal = {"source": "scripted", "script": str(script.path), "period_s": 0.2}
    denoiser = {"name": "denoiser", "torch_threads": 1, "num_replicas": 2}
    any_world.have(
        replicas=1, thermal=thermal, denoiser=[denoiser | {"checkpoint_every_steps": EVERY}]
    )
    return any_world


@pytest.fixture
def world(slow_world: World) -> World:
    wait_until(lambda: len(slow_world.replicas("denoise")) == 2)
    return slow_world


@pytest.fixture(scope="module")
def undisturbed(slow_world: World) -> Any:
    return slow_world.pixels(slow_world.generate(**JOB))


def worker(world: World) -> dict[str, Any]:
    (working,) = [each for each in world.replicas("denoise") if each["queue_length"]]
    return working


def steps_until_the_end(events: Iterator[dict[str, Any]]) -> tuple[list[int], dict[str, Any]]:
    """Return the steps that are told from now on, and how the denoiser's part is reported."""
    *told, last = events
    assert last["event"] == "stored", last
    (report,) = [each for each in last["result"]["stages"] if each["stage"] == "denoise"]
    return [each["step"] for each in told if each["event"] == "step"], last["result"] | report


def test_killed_at_step_15_of_20_it_goes_on_from_the_last_checkpoint(world: World, undisturbed):
    began = time.monotonic()
    job_id = world.submit(**JOB)
    with following(world.http, job_id) as events:
        victim = None
        for event in events:
            if event["event"] == "step":
                victim = victim or worker(world)
                if event["step"] == AT_STEP:
                    break
        assert victim is not None
        os.kill(victim["pid"], signal.SIGKILL)
        told, report = steps_until_the_end(events)
    # Told before it died, if at all: steps 16 and 17.
    resumed = told[next(at for at, step in enumerate(told) if step <= AT_STEP) :]
    assert resumed == list(range(resumed[0], STEPS + 1))
    assert resumed[0] > AT_STEP - EVERY
    assert report["pid"] != victim["pid"]
    assert report["moves"] == 1
    assert 0 < report["steps_repeated"] <= EVERY
    np.testing.assert_array_equal(world.pixels(report), undisturbed)
    assert time.monotonic() - began < 40


def test_a_replica_that_serve_asks_to_go_hands_over_and_no_step_is_repeated(
    world: World, undisturbed
):
    job_id = world.submit(**JOB)
    with following(world.http, job_id) as events:
        for event in events:
            if event["event"] == "step" and event["step"] >= 3:
                break
        leaving = worker(world)
        # What Serve's controller calls; it goes on sending work there, as no controller would.
        name = f"SERVE_REPLICA::kelvin#denoiser#{leaving['replica']}"
        ray.get_actor(name, namespace="serve").perform_graceful_shutdown.remote()
        told, report = steps_until_the_end(events)
    assert told == list(range(told[0], STEPS + 1)), "each step once"
    assert report["pid"] != leaving["pid"]
    assert (report["moves"], report["steps_repeated"]) == (1, 0)
    np.testing.assert_array_equal(world.pixels(report), undisturbed)
    os.kill(leaving["pid"], signal.SIGKILL)  # Serve replaces it
