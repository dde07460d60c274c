"""One of three cards gets hot: work goes elsewhere, a replica is added, and it goes again.

Real Ray and real replicas; what their cards seem to read is written by the test. The three steps
are one story and share one start.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from tests.inprocess import chromium
from tests.ray.hot_cards import HeatScript, SteadyWork
from tests.ray.world import World, wait_until

pytestmark = pytest.mark.own_kelvin

REQUEST = {"prompt": "a red circle", "num_inference_steps": 6, "seed": 7}
# Of three cool replicas' capacity: two and a hot one are too few for it, by the plan.
BUSY_REPLICAS = 1.6
_SHARE_OVER_S = 5.0
# A rehearsal is marked wherever it shows; demand and waiting are a stage's, not a pool's.
GAUGES = (
    r'kelvin_replica_slowdown_ratio{[^}]*source="scripted"',
    r'kelvin_replica_duty_ratio{[^}]*source="scripted"',
    r'kelvin_stage_demand_ratio{[^}]*stage="denoise"',
    r'kelvin_stage_waiting_seconds{[^}]*stage="denoise"',
    r"kelvin_pool_derated_replicas{[^}]*} 1.0",
)


@pytest.fixture
def script(tmp_path: Path) -> HeatScript:
    return HeatScript(tmp_path)


@pytest.fixture
def hot_world(any_world: World, script: HeatScript) -> World:
    denoiser = {"num_replicas": 3, "min_replicas": 3, "max_replicas": 5, "start_s": 3.0}
    any_world.have(
        replicas=1,
        denoiser=[{"name": "denoiser", "torch_threads": 1, "kind_speed": 1.0, **denoiser}],
        thermal={"source": "scripted", "script": str(script.path), "period_s": 0.2},
        autoscaling={
            "scale_in_after_s": 5.0,
            "after_surprise_s": 5.0,
            "fast_s": 5.0,
            "slow_s": 10.0,
        },
    )
    return any_world


class Story:
    """What is asked of the status on the way."""

    def __init__(self, world: World) -> None:
        self.world = world

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.world.http.get("/v1/status").json()
        return found

    def pool(self) -> dict[str, Any]:
        found: dict[str, Any] = self.status()["autoscaling"]["pools"]["denoiser"]
        return found

    def loads(self) -> dict[str, dict[str, Any]]:
        return {replica["replica"]: replica["load"] for replica in self.world.replicas("denoise")}

    def accepted(self) -> dict[str, int]:
        return {name: load["accepted"] for name, load in self.loads().items()}

    def work(self) -> tuple[int, float]:
        """Return how many pictures the denoisers have accepted, and their work in cool seconds."""
        loads = self.loads().values()
        return sum(load["accepted"] for load in loads), sum(load["accepted_s"] for load in loads)

    def cool_s(self, before: tuple[int, float] = (0, 0.0)) -> float:
        """Return the work of one request, from all that were accepted since."""
        number, seconds = self.work()
        return (seconds - before[1]) / (number - before[0])

    def comes(self, condition: Callable[[], bool], within_s: float, since: float | None = None):
        """Wait until true; where it never is, the plan's own words say why."""
        began = time.monotonic() if since is None else since
        try:
            wait_until(condition, within_s=max(began + within_s - time.monotonic(), 0.1))
        except AssertionError:
            pytest.fail(f"it did not come about: {self.status()['autoscaling']}")

    def hot_replica(self) -> str:
        (found,) = [
            replica["replica"]
            for replica in self.world.replicas("denoise")
            if replica["heat"].get("margin_c") == 2
        ]
        return str(found)

    def share_falls(self, replica: str, within_s: float) -> None:
        """Wait until a replica takes less than half of its fair share of new work."""
        before, since = self.accepted(), time.monotonic()
        deadline = since + within_s

        def has_fallen() -> bool:
            nonlocal before, since
            now = self.accepted()
            new = {name: count - before.get(name, 0) for name, count in now.items()}
            if time.monotonic() - since < _SHARE_OVER_S or sum(new.values()) < 6:
                return False
            fallen = new[replica] / sum(new.values()) < 0.5 / len(new)
            before, since = now, time.monotonic()
            return fallen

        wait_until(has_fallen, within_s=deadline - time.monotonic())


def gauges() -> str:
    """Return what Prometheus would read of this node."""
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return httpx.get(url, trust_env=False).text


def controller_log() -> str:
    from ray._private.worker import _global_node

    assert _global_node is not None
    logs = Path(_global_node.get_session_dir_path()) / "logs" / "serve"
    return "".join(path.read_text() for path in logs.glob("controller_*.log"))


def is_seen(url: str, reason: str) -> None:
    """Look at the operations view, where there is a browser."""
    if chromium.missing():
        return
    with chromium.chromium() as browser, chromium.opened(browser, f"{url}/#operations") as page:
        chromium.until(page, "document.querySelectorAll('.card.hot').length === 1")
        assert re.search(r"Margin\s+2 °C", page.inner_text(".card.hot"))
        assert reason in page.inner_text("#changes")
        # What the plan says meanwhile of each pool changes with the second.
        assert re.search(r"denoiser (stays at \d|\d -> \d): ", page.inner_text("#pools"))


def test_a_hot_card_is_avoided_and_made_up_for_until_it_is_cool(
    hot_world: World, script: HeatScript
):
    story = Story(hot_world)
    wait_until(lambda: story.pool().get("replicas") == 3)
    for _ in range(6):
        hot_world.generate(**REQUEST)
    every_s = story.cool_s() / BUSY_REPLICAS
    assert hot_world.kelvin is not None
    with SteadyWork(hot_world.kelvin.url, REQUEST, every_s) as work:
        # The plan has seen the load and finds that three are right.
        usual, before = 3, story.work()

        def is_as_busy_as_meant() -> bool:
            # On a machine with other work the first few say little of what those take that follow.
            if story.work()[0] >= before[0] + 6:
                work.every_s = story.cool_s(before) / BUSY_REPLICAS
            pool = story.pool()
            return bool(pool["target"] == usual and pool["demand"] > 0.95 * BUSY_REPLICAS)

        story.comes(is_as_busy_as_meant, 90.0)
        script.set(temperature_c=83, slowdown=24.0)
        wait_until(lambda: any(r["heat"]["margin_c"] == 2 for r in hot_world.replicas("denoise")))
        began = time.monotonic()
        hot = story.hot_replica()
        story.share_falls(hot, within_s=15.0)
        story.comes(lambda: story.pool()["target"] > usual, 15.0, began)
        told = story.status()["autoscaling"]
        is_seen(hot_world.kelvin.url, told["changes"][-1]["reason"])
        # Each sample has labels of Ray's own beside these.
        wait_until(lambda: all(re.search(pattern, gauges()) for pattern in GAUGES))
        assert not re.search(
            'kelvin_(pool_demand|pool_waiting|replica_duty_ratio{[^}]*"nvml")', gauges()
        )
        story.comes(lambda: len(hot_world.replicas("denoise")) > usual, 60.0, began)
        script.set()
        story.comes(lambda: story.pool()["target"] == usual, 90.0)
        story.comes(lambda: len(hot_world.replicas("denoise")) == usual, 90.0)
        last = story.status()["autoscaling"]
        logged = controller_log()

    assert work.failures == []
    assert len(work.answers) > 20
    out, back = last["changes"][-2:]
    assert (out["before"], out["after"]) == (usual, usual + 1)
    assert "2 C margin" in out["reason"]
    assert "(scripted readings: a rehearsal)" in out["reason"]
    assert "2 C margin" in str(told)
    assert (back["before"], back["after"]) == (usual + 1, usual)
    assert back["reason"]
    assert out["reason"] in logged
    assert back["reason"] in logged
