"""A new version is rolled out and two of three denoisers go, under load: no request notices.

Nor does one when everything is deleted and deployed again. Slow; run by `make test-slow`.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve.context import _get_global_client

from serve.app import APP_NAME, build
from serve.jobs import JobJournal
from serve.lease_store import LeaseStore
from serve.storage import ObjectStore
from tests.ray.hot_cards import HeatScript
from tests.ray.world import World, wait_until

pytestmark = pytest.mark.own_kelvin

AT_ONCE = 8
LEAST = 200
STEPS = 12


@pytest.fixture
def rolling_world(any_world: World, tmp_path: Path) -> World:
    # Rehearsed cards, an eighth of a second a step: who goes has work under way.
    thermal = {"source": "scripted", "script": str(HeatScript(tmp_path).path), "period_s": 0.2}
    any_world.have(
        replicas=1,
        thermal=thermal,
        denoiser=[{"name": "denoiser", "torch_threads": 1, "num_replicas": 3}],
        pipeline={"num_replicas": 2},
    )
    return any_world


class Load:
    """Requests without end, every second one as a job; a context."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._stop = threading.Event()
        self._senders = ThreadPoolExecutor(AT_ONCE)
        self.results: list[dict[str, Any]] = []
        self.failures: list[Any] = []

    def __enter__(self) -> Load:
        for number in range(AT_ONCE):
            self._senders.submit(self._run, number)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._senders.shutdown()

    @property
    def ended(self) -> int:
        return len(self.results) + len(self.failures)

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            fields = {"prompt": f"load {number}", "num_inference_steps": STEPS, "seed": number}
            try:
                make = self._as_job if number % 2 else self._world.generate
                self.results.append(make(**fields))
            except Exception as error:
                self.failures.append(error)
            number += AT_ONCE + 1

    def _as_job(self, **fields: Any) -> dict[str, Any]:
        job_id = self._world.submit(**fields)
        record: dict[str, Any] = {}

        def has_ended() -> bool:
            record.update(self._world.http.get(f"/v1/jobs/{job_id}").json())
            return record["status"] not in ("pending", "running")

        wait_until(has_ended, within_s=180)
        assert record["status"] == "succeeded", record
        result: dict[str, Any] = record["result"]
        return result


@pytest.mark.slow
def test_a_rolling_redeploy_and_a_scale_in_under_load_fail_nobody(rolling_world: World):
    world = rolling_world
    before = {each["pid"] for each in world.replicas("denoise")}
    assert world.kelvin is not None
    with Load(world) as load:
        wait_until(lambda: load.ended >= AT_ONCE)
        # Every replica of every deployment is replaced: a deployment by code is a new version.
        serve.run(
            build(world.kelvin.settings),
            name=APP_NAME,
            route_prefix="/",
            external_scaler_enabled=True,
        )
        wait_until(
            lambda: len({each["pid"] for each in world.replicas("denoise")} - before) == 3, 180
        )
        done = load.ended
        controller = _get_global_client()._controller
        denoiser = DeploymentID(name="denoiser", app_name=APP_NAME)
        ray.get(controller.update_deployment_replicas.remote(denoiser, 1))
        wait_until(lambda: len(world.replicas("denoise")) == 1, 180)
        wait_until(lambda: load.ended >= max(LEAST, done + 2 * AT_ONCE), 300)
    assert load.failures == []
    reports = [
        report
        for result in load.results
        for report in result["stages"]
        if report["stage"] == "denoise"
    ]
    assert len(reports) >= LEAST
    assert sum(report["moves"] for report in reports) > 0
    assert sum(report["steps_repeated"] for report in reports) == 0


@pytest.mark.slow
def test_deleting_the_application_leaves_its_jobs_to_the_next(rolling_world: World):
    world = rolling_world
    assert world.kelvin is not None
    jobs = {world.submit(num_inference_steps=40, num_images=2, seed=n) for n in range(6)}
    serve.delete(APP_NAME)
    store = ObjectStore(world.storage)
    left = asyncio.run(JobJournal(store).pending())
    assert left
    assert jobs.issuperset(left)
    # So that whoever comes next need not wait.
    assert asyncio.run(LeaseStore(store).etags()) == {}
    serve.run(
        build(world.kelvin.settings),
        name=APP_NAME,
        route_prefix="/",
        external_scaler_enabled=True,
    )
    for job_id in jobs:
        wait_until(
            lambda job_id=job_id: (  # type: ignore[misc]
                world.http.get(f"/v1/jobs/{job_id}").json()["status"] == "succeeded"
            ),
            within_s=180,
        )
