"""What one run comes to: figures over the counted time, and series for the plot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.simulation.cards import Cards
from cluster.simulation.kinds import kind, step_costs
from cluster.simulation.pool import Pool
from cluster.simulation.scenario import Scenario
from cluster.simulation.traffic import Request

SAMPLE_S = 10.0


@dataclass
class Series:
    """One value every `SAMPLE_S` each."""

    at_s: list[float] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)  # requests, at handles and in denoisers
    replicas: list[int] = field(default_factory=list)  # denoisers that take requests
    held: list[int] = field(default_factory=list)  # and those starting or draining
    temperature_low_c: list[float] = field(default_factory=list)  # 5th percentile of occupied
    temperature_c: list[float] = field(default_factory=list)  # median
    temperature_high_c: list[float] = field(default_factory=list)  # highest
    throttled: list[int] = field(default_factory=list)  # occupied cards
    arriving: list[int] = field(default_factory=list)
    latency_p95_s: list[float | None] = field(default_factory=list)  # of what ended since


class Measures:
    """Counts one run.

    Args:
        scenario: Says from when to when to count, and what is fast enough.
        cards: Of the cluster.
    """

    def __init__(self, scenario: Scenario, cards: Cards) -> None:
        self._scenario = scenario
        self._cards = cards
        self._costs = step_costs(scenario.reference_kind, scenario.model)
        self._own_s: dict[tuple[Any, ...], float] = {}
        self._latencies: list[float] = []
        self._slowdowns: list[float] = []
        self._lately: list[float] = []
        self._next_sample = 0.0
        self.series = Series()
        self.arrived = 0
        self.ended = 0
        self.counted_arrivals = 0
        self.restarts = 0
        self._images = 0
        self._arriving = 0
        self._gpu_s = 0.0
        self._cost = 0.0
        self._stage_j = 0.0
        self._energy_j = self._throttled_s = self._hottest_c = 0.0

    def unloaded_s(self, request: Request) -> float:
        """Return the latency on an idle cluster of the reference kind."""
        asked = (request.shape, request.rows, request.steps)
        found = self._own_s.get(asked)
        if found is None:
            scenario = self._scenario
            denoise = request.steps * self._costs.seconds(request.shape, request.rows)
            found = denoise + scenario.text.seconds + scenario.decode.seconds
            self._own_s[asked] = found
        return found

    def came(self, request: Request) -> None:
        """Count an arrival."""
        self.arrived += 1
        self._arriving += 1
        self.counted_arrivals += request.at >= self._scenario.warm_up_s

    def finished(self, request: Request, now: float) -> None:
        """Count an end.

        Raises:
            RuntimeError: The request ended before.
        """
        if request.latency_s is not None:
            raise RuntimeError(f"request {request.key} ended twice")
        request.latency_s = now - request.at
        self.ended += 1
        self.restarts += request.restarts
        self._lately.append(request.latency_s)
        if request.at >= self._scenario.warm_up_s:
            self._latencies.append(request.latency_s)
            self._slowdowns.append(request.latency_s / self.unloaded_s(request))
        self._images += self._scenario.warm_up_s <= now < self._scenario.duration_s

    def tick(self, now: float, seconds: float, pools: list[Pool]) -> None:
        """Count time: what is held costs, whether it works or not."""
        scenario = self._scenario
        if now - seconds < scenario.warm_up_s <= now:
            self._cards.count_from_now()
        if scenario.warm_up_s < now <= scenario.duration_s:
            for pool in pools:
                self._gpu_s += pool.held * seconds
                if pool.spec.stage != "denoise":
                    self._count_stage(pool, seconds)
            occupied = self._cards.occupied
            self._cost += seconds * float(self._cards.cost_per_hour[occupied].sum()) / 3600
            if now + seconds > scenario.duration_s:
                self._energy_j = float(self._cards.energy_j.sum())
                self._throttled_s = float(self._cards.throttled_s.sum())
                self._hottest_c = float(self._cards.hottest_c.max())
        if now >= self._next_sample and now <= scenario.duration_s:
            self._next_sample = now + SAMPLE_S
            self._sample(now, pools)

    def figures(self) -> dict[str, Any]:
        """Return the figures of the run; everything JSON."""
        slowdowns = np.array(self._slowdowns)
        latencies = np.array(self._latencies) if self._latencies else np.array([np.nan])
        fast = int((slowdowns <= self._scenario.slo_factor).sum())
        return {
            "slo_attainment": round(fast / max(self.counted_arrivals, 1), 5),
            "p50_s": round(float(np.percentile(latencies, 50)), 3),
            "p95_s": round(float(np.percentile(latencies, 95)), 3),
            "p99_s": round(float(np.percentile(latencies, 99)), 3),
            "throttled_gpu_s": round(self._throttled_s, 1),
            "peak_temperature_c": round(self._hottest_c, 1),
            "gpu_hours": round(self._gpu_s / 3600, 4),
            "cost": round(self._cost, 3),
            "joules_per_image": round((self._energy_j + self._stage_j) / max(self._images, 1), 1),
            "requests": self.arrived,
            "unfinished": self.arrived - self.ended,
            "restarts": self.restarts,
        }

    def _count_stage(self, pool: Pool, seconds: float) -> None:
        stage = self._scenario.text if pool.spec.stage == "text" else self._scenario.decode
        card = kind(stage.kind)
        busy = sum(replica.ongoing > 0 for replica in pool.replicas)
        watts = pool.held * card.idle_w + busy * (card.load_w - card.idle_w)
        self._stage_j += watts * seconds
        self._cost += pool.held * seconds * card.cost_per_hour / 3600

    def _sample(self, now: float, pools: list[Pool]) -> None:
        series, cards = self.series, self._cards
        denoisers = [pool for pool in pools if pool.spec.stage == "denoise"]
        warm = cards.temperature_c[cards.occupied]
        series.at_s.append(now)
        series.waiting.append(
            sum(len(pool.waiting) for pool in pools)
            + sum(max(one.ongoing - 1, 0) for pool in denoisers for one in pool.replicas)
        )
        series.replicas.append(sum(len(pool.replicas) for pool in denoisers))
        series.held.append(sum(pool.held for pool in denoisers))
        low, middle, high = np.percentile(warm, [5, 50, 100]) if warm.size else [0.0] * 3
        series.temperature_low_c.append(round(float(low), 1))
        series.temperature_c.append(round(float(middle), 1))
        series.temperature_high_c.append(round(float(high), 1))
        series.throttled.append(int((cards.throttled & cards.occupied).sum()))
        series.arriving.append(self._arriving)
        self._arriving = 0
        p95 = round(float(np.percentile(self._lately, 95)), 2) if self._lately else None
        series.latency_p95_s.append(p95)
        self._lately = []
