"""A new version is rolled out and two of three denoisers go, under load: no request notices.

Nor does one when everything is deleted and deployed again. Slow; run by `make test-slow`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve.api import RunTarget
from ray.serve.context import _get_global_client

from serve.app import APP_NAME, build
from serve.jobs import JobJournal
from serve.lease_store import LeaseStore
from serve.storage import ObjectStore
from tests.ray.hot_cards import HeatScript
from tests.ray.world import World

pytestmark = pytest.mark.own_kelvin

AT_ONCE = 8
LEAST = 200
STEPS = 4
_LOOK_S = 0.5


@pytest.fixture
def rolling_world(any_world: World, tmp_path: Path) -> World:
    # Rehearsed cards, an eighth of a second a step: who goes has work under way.
    thermal = {"source": "scripted", "script": str(HeatScript(tmp_path).path), "period_s": 0.2}
    one = {"num_replicas": 1, "torch_threads": 1}
    any_world.have(
        replicas=1,
        thermal=thermal,
        # Of these the only one goes first, and of the others the new one comes first.
        text_encoder=[{"name": "text-encoder", **one}],
        vae_decoder=[{"name": "vae-decoder", "max_surge_percent": 1, **one}],
        denoiser=[{"name": "denoiser", "torch_threads": 1, "num_replicas": 3}],
        pipeline={"num_replicas": 2},
    )
    return any_world


class Replicas:
    """All that Serve has had of each deployment since the beginning."""

    def __init__(self) -> None:
        self._controller = _get_global_client()._controller
        self.least_running: dict[str, int] = {}
        self._first = self.look()

    def look(self) -> dict[str, dict[str, str]]:
        """Return deployment -> replica -> its state, as Serve says now."""
        told = ray.get(self._controller.get_serve_instance_details.remote())
        deployments = told["applications"][APP_NAME]["deployments"]
        now = {
            name: {each["replica_id"]: each["state"].value for each in deployment["replicas"]}
            for name, deployment in deployments.items()
        }
        for name, states in now.items():
            running = list(states.values()).count("RUNNING")
            self.least_running[name] = min(self.least_running.get(name, running), running)
        return now

    def not_replaced(self) -> dict[str, dict[str, str]]:
        """Return what there is of the deployments that are not yet as many others as at first."""
        return {
            name: states
            for name, states in self.look().items()
            if set(states.values()) != {"RUNNING"}
            or len(states) != len(self._first[name])
            or states.keys() & self._first[name].keys()
        }

    def more_than(self, number: int, name: str) -> dict[str, str]:
        """Return what there is of a deployment that has more than so many, or nothing."""
        states = self.look()[name]
        return states if len(states) > number else {}

    def scale(self, name: str, number: int) -> None:
        """Ask Serve for so many."""
        deployment = DeploymentID(name=name, app_name=APP_NAME)
        ray.get(self._controller.update_deployment_replicas.remote(deployment, number))


def deploy_anew(world: World) -> None:
    """Ask for a new version of every deployment, which any deployment by code is."""
    assert world.kelvin is not None
    app = build(world.kelvin.settings)
    target = RunTarget(app, name=APP_NAME, route_prefix="/", external_scaler_enabled=True)
    serve.run_many([target], wait_for_applications_running=False)


def await_end_of(
    missing: Callable[[], object], within_s: float, failures: Sequence[object] = ()
) -> None:
    """Wait until nothing is missing any more; what still is gets told in time, or if one fails."""
    deadline = time.monotonic() + within_s
    while left := missing():
        assert not failures, f"{failures}; missing: {left}"
        assert time.monotonic() < deadline, f"after {within_s:g} s still missing: {left}"
        time.sleep(_LOOK_S)


class Load:
    """Requests without end, every second one as a job; a context."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._stop = threading.Event()
        self._senders = ThreadPoolExecutor(AT_ONCE)
        self._under_way: dict[int, str] = {}
        self.results: list[dict[str, Any]] = []
        self.failures: list[Exception] = []

    def __enter__(self) -> Load:
        for number in range(AT_ONCE):
            self._senders.submit(self._run, number)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._senders.shutdown()

    def too_few(self, least: int) -> str:
        """Return what is missing to so many requests that succeeded, or nothing."""
        if len(self.results) >= least:
            return ""
        return f"{least - len(self.results)} of {least} requests; under way {self._under_way}"

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            fields = {"prompt": f"load {number}", "num_inference_steps": STEPS, "seed": number}
            self._under_way[number] = "call"
            try:
                make = self._as_job if number % 2 else self._world.generate
                self.results.append(make(**fields))
            except Exception as error:
                self.failures.append(error)
            del self._under_way[number]
            number += AT_ONCE + 1

    def _as_job(self, **fields: Any) -> dict[str, Any]:
        job_id = self._world.submit(**fields)
        self._under_way[fields["seed"]] = f"job {job_id}"
        record: dict[str, Any] = {}

        def not_ended() -> dict[str, Any] | None:
            record.update(self._world.http.get(f"/v1/jobs/{job_id}").json())
            return record if record["status"] in ("pending", "running") else None

        await_end_of(not_ended, within_s=180)
        assert record["status"] == "succeeded", record
        result: dict[str, Any] = record["result"]
        return result


# It takes 115 s on 2 cores. The limit lies above all that it waits for together, so that the test
# itself says what is missing.
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rolling_redeploy_and_a_scale_in_under_load_fail_nobody(rolling_world: World):
    replicas = Replicas()
    with Load(rolling_world) as load:

        def go_on(missing: Callable[[], object], within_s: float) -> None:
            await_end_of(missing, within_s, load.failures)

        go_on(lambda: load.too_few(AT_ONCE), within_s=60)
        before = len(load.results)
        deploy_anew(rolling_world)
        go_on(replicas.not_replaced, within_s=180)
        least_running = dict(replicas.least_running)
        during = len(load.results) - before
        replicas.scale("denoiser", 1)
        go_on(lambda: replicas.more_than(1, "denoiser"), within_s=90)
        least = max(LEAST, len(load.results) + 2 * AT_ONCE)
        go_on(lambda: load.too_few(least), within_s=240)
    assert load.failures == []
    assert during >= AT_ONCE
    assert least_running["vae-decoder"] >= 1
    assert least_running["pipeline"] >= 2
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
@pytest.mark.timeout(600)
def test_deleting_the_application_leaves_its_jobs_to_the_next(rolling_world: World):
    world = rolling_world
    jobs = {world.submit(num_inference_steps=40, num_images=2, seed=n) for n in range(6)}
    serve.delete(APP_NAME)
    store = ObjectStore(world.storage)
    left = asyncio.run(JobJournal(store).pending())
    assert left
    assert jobs.issuperset(left)
    # So that whoever comes next need not wait.
    assert asyncio.run(LeaseStore(store).etags()) == {}
    deploy_anew(world)

    def not_succeeded() -> dict[str, str]:
        answers = {job_id: world.http.get(f"/v1/jobs/{job_id}") for job_id in jobs}
        return {
            job_id: answer.text
            for job_id, answer in answers.items()
            if answer.status_code != 200 or answer.json()["status"] != "succeeded"
        }

    await_end_of(not_succeeded, within_s=300)
