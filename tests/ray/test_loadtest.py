"""Load by the Ray Serve handle, beside the HTTP doors: locust's process itself has no Ray."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import ray

from loadtest.load_plan import PlanOptions, make_plan
from loadtest.locust_process import offer
from loadtest.service_facts import doors_for, model_facts
from serve.client import Kelvin
from tests.ray.world import World

# Looked for and not imported: it patches whoever imports it.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("locust") is None, reason="needs locust: pip install -e '.[dev]'"
)


def test_the_handle_is_a_door_like_the_others(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert world.kelvin is not None
    # By its address: tests beside this one may have Rays of their own.
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    url = world.kelvin.url
    with Kelvin(url) as client:
        doors, note = doors_for("mixed", client)
        options = PlanOptions(rate=4, duration_s=2, door="mixed")
        plan = make_plan(options, model_facts(client), doors)
    assert (doors, note) == (("native", "openai", "comfyui", "handle"), "")
    outcomes = offer(url, plan, tmp_path, pictures=100).outcomes
    assert {each.number: (each.door, each.error) for each in outcomes} == {
        ask.number: (ask.door, "") for ask in plan.asks
    }
    by_handle = [each for each in outcomes if each.door == "handle"]
    assert by_handle
    for each in by_handle:
        # Nobody is due before the slowest user is connected, and Ray takes seconds.
        assert each.late_s < 1
        assert each.job_id is not None
        assert world.http.get(f"/v1/jobs/{each.job_id}").json()["status"] == "succeeded"
        assert each.picture is not None
        assert (tmp_path / "pictures" / each.picture).stat().st_size > 100
