"""What the plan and a routing decision take with a thousand replicas, on this machine.

Seconds of the processor: on a busy machine the clock on the wall measures the neighbours.
"""

from __future__ import annotations

import random
import time
from statistics import median
from typing import Any

from cluster.autoscaling import PlanMemory, PlanSettings, plan
from cluster.load_board import LoadBoard
from cluster.pool_state import PoolState, ReplicaState
from cluster.routing import ReplicaLoad, RoutedWork, RoutingSettings

REPLICAS = 1000
_MOST_PLAN_MS = 5.0
_MOST_ROUTING_US = 50.0
_PLANS, _ROUTED = 60, 3000


def measure_policies() -> dict[str, Any]:
    """Return the milliseconds of a plan and the microseconds of a decision, with targets."""
    plans = _plan_seconds()
    decisions = _routing_seconds()
    plan_ms = round(1e3 * median(plans), 3)
    routing_us = round(1e6 * median(decisions), 1)
    return {
        "replicas": REPLICAS,
        "plan_ms": {"median": plan_ms, "fastest": round(1e3 * min(plans), 3)},
        "routing_us": {
            "median": routing_us,
            "fastest": round(1e6 * min(decisions), 1),
            "what": "LoadBoard.assign",
        },
        "targets": {
            f"plan of {REPLICAS} replicas, ms": {
                "at_most": _MOST_PLAN_MS,
                "is": plan_ms,
                "met": plan_ms <= _MOST_PLAN_MS,
            },
            f"routing among {REPLICAS} replicas, us": {
                "at_most": _MOST_ROUTING_US,
                "is": routing_us,
                "met": routing_us <= _MOST_ROUTING_US,
            },
        },
    }


def _plan_seconds() -> list[float]:
    memory, settings, seconds = PlanMemory(), PlanSettings(), []
    for tick in range(_PLANS):
        pools = _pools(tick)
        begun = time.process_time()
        _, memory = plan(pools, memory, float(tick), settings)
        seconds.append(time.process_time() - begun)
    return seconds


def _pools(tick: int) -> list[PoolState]:
    """Return one text, one decode and three denoiser pools; some cards are hot, all are at work."""
    draw = random.Random(tick)
    sizes = (("text", "CPU", 10), ("decode", "CPU", 10))
    kinds = (("H100", 80, 1.0), ("L4", 800, 0.08), ("A10G", 100, 0.07))
    pools = [
        PoolState(
            name=name,
            stage="text" if name == "text" else "decode",
            model="large",
            kind=kind,
            replicas=tuple(_replica(f"{name}{at}", tick, 0.05, draw) for at in range(number)),
            target=number,
            minimum=1,
            maximum=2 * number,
            request_s=0.05,
        )
        for name, kind, number in sizes
    ]
    for kind, number, speed in kinds:
        own = 2.3 / speed
        pools.append(
            PoolState(
                name=f"denoiser-{kind.lower()}",
                stage="denoise",
                model="large",
                kind=kind,
                replicas=tuple(_replica(f"{kind}{at}", tick, own, draw) for at in range(number)),
                target=number,
                minimum=1,
                maximum=2 * number,
                request_s=own,
                kind_speed=speed,
            )
        )
    return pools


def _replica(id: str, tick: int, own_s: float, draw: random.Random) -> ReplicaState:
    return ReplicaState(
        id=id,
        waiting_s=draw.random() * own_s,
        running_s=draw.random() * own_s,
        requests=2,
        accepted=tick,
        accepted_s=tick * 0.7,
        slowdown=1 + 0.2 * draw.random(),
        margin_c=20 * draw.random(),
        power_w=300.0,
        reading_age_s=0.5,
    )


def _routing_seconds() -> list[float]:
    draw = random.Random(0)
    board = LoadBoard(RoutingSettings(), 0)
    board.keep([f"replica{at}" for at in range(REPLICAS)])
    now = 0.0
    for at in range(REPLICAS):
        load = ReplicaLoad(f"replica{at}", 5 * draw.random(), 1.0, 20 * draw.random())
        board.report(load, now)
    work, seconds = RoutedWork(2.3), []
    for _ in range(_ROUTED):
        now += 0.005  # 200 requests a second
        begun = time.process_time()
        board.assign(work, now)
        seconds.append(time.process_time() - begun)
    return seconds
