"""Three stages without replicas: the first request starts them together."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from tests.ray.world import FAST, World, wait_until

pytestmark = pytest.mark.own_kelvin

STAGES = {"text": "text_encoder", "denoise": "denoiser", "decode": "vae_decoder"}


@pytest.fixture
def empty_world(any_world: World) -> World:
    size = {"num_replicas": 0, "min_replicas": 0, "max_replicas": 1, "torch_threads": 1}
    pools: dict[str, Any] = {
        section: [{"name": section.replace("_", "-"), **size}] for section in STAGES.values()
    }
    any_world.have(replicas=1, **pools)
    return any_world


def test_the_first_request_starts_all_stages_at_once(empty_world: World):
    world = empty_world
    assert all(world.replicas(stage) == [] for stage in STAGES)
    came: dict[str, float] = {}

    def all_came() -> bool:
        for stage in STAGES:
            if stage not in came and world.replicas(stage):
                came[stage] = time.monotonic()
        return len(came) == len(STAGES)

    began = time.monotonic()
    answers: list[Any] = []
    request = threading.Thread(target=lambda: answers.append(world.generate(**FAST)))
    request.start()
    wait_until(all_came, within_s=120.0)
    request.join()
    assert len(answers) == 1
    # One after the other, the last comes after three times what the first takes.
    first, last = min(came.values()) - began, max(came.values()) - began
    assert last < 1.8 * first, came
