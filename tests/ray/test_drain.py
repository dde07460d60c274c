"""A node is drained while jobs run: none is lost, and every stage goes on elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.drain_plan import emptied_stages, moves
from loadtest.chaos_nodes import WorkerNodes
from serve.commands.drain import refusal
from serve.node_drain import cluster_nodes, deployed, replicas_on
from tests.ray.world import World, wait_until

ROOT = Path(__file__).parents[2]
STAGES = ("text", "denoise", "decode")


def drain(*arguments: str) -> tuple[int, dict[str, Any]]:
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "-m", "serve", "drain", *arguments, "--json"],
        stdout=subprocess.PIPE,
        env={**os.environ, "RAY_ADDRESS": address},
        cwd=ROOT,
        text=True,
        check=False,
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_what_runs_where_is_read_from_serve_and_a_node_with_all_of_it_may_not_go(world: World):
    head = ray.get_runtime_context().get_node_id()
    (node,) = [each for each in cluster_nodes() if each.id == head]
    assert node.is_head
    settings = world.settings(replicas=2)

    def stages() -> dict[str, tuple[str, ...]]:
        return {each.stage: each.nodes for each in deployed(settings) if each.stage in STAGES}

    wait_until(lambda: stages() == dict.fromkeys(STAGES, (head, head)))
    running = deployed(settings)
    assert replicas_on(head) >= 7  # two of each stage, and the Pipeline
    planned = moves(head, running, others=[])
    emptied = emptied_stages(planned, head, running)
    assert set(STAGES) < set(emptied)
    assert "2 here, 0 elsewhere, room for 0 more" in refusal(node, emptied).message


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_a_node_that_is_drained_loses_no_job(world: World):
    head = ray.get_runtime_context().get_node_id()
    code, told = drain(head)
    assert (code, told["error"]["field"]) == (2, "node")
    with WorkerNodes(1, num_cpus=4):
        (node,) = [
            each["NodeID"] for each in ray.nodes() if each["Alive"] and each["NodeID"] != head
        ]
        # What is on the head dies once, and some of it starts on the new node.
        assert world.http.get("/readyz").status_code == 200
        placed_there(world, node)
        jobs = [world.submit(num_inference_steps=200, num_images=4, seed=seed) for seed in range(6)]
        code, told = drain(node[:12], "--wait", "240")
        assert code == 0, told
        assert told["node"] == node
        assert told["left"] == 0
        assert sum(move["here"] for move in told["moves"]) >= 1
        moved = 0
        for job in jobs:
            wait_until(lambda job=job: ended(world, job), within_s=120)  # type: ignore[misc]
            record = world.http.get(f"/v1/jobs/{job}").json()
            assert record["status"] == "succeeded", record
            moved += sum(stage.get("moves") or 0 for stage in record["result"]["stages"])
        for stage in STAGES:
            on = {replica["node"] for replica in world.replicas(stage)}
            assert on
            assert node not in on
        # What was under way there went on elsewhere, and Ray let the idle node go.
        assert moved >= 1
        wait_until(lambda: node not in {e["NodeID"] for e in ray.nodes() if e["Alive"]})


def ended(world: World, job: str) -> bool:
    return world.http.get(f"/v1/jobs/{job}").json()["status"] not in ("pending", "running")


def placed_there(world: World, node: str) -> None:
    """Kill denoisers of the head until one comes back on the node: Serve spreads them."""

    def there() -> bool:
        found = world.replicas("denoise")
        return len(found) == 2 and any(each["node"] == node for each in found)

    for _ in range(4):
        if there():
            return
        victim = next(each for each in world.replicas("denoise") if each["node"] != node)
        os.kill(victim["pid"], signal.SIGKILL)
        wait_until(
            lambda pid=victim["pid"]: (  # type: ignore[misc]
                pid not in (pids := {each["pid"] for each in world.replicas("denoise")})
                and len(pids) == 2
            ),
            within_s=120,
        )
    assert there()
