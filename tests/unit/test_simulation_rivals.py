"""The rivals are what they claim to be: Serve's own functions beside ours, and the formula."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from cluster.simulation.pool import Pool, PoolSpec
from cluster.simulation.queue_only import (
    Delays,
    OngoingMean,
    PowerOfTwo,
    QueueOnlySettings,
    desired,
)
from cluster.simulation.threshold import wanted


def _ray_config(own: QueueOnlySettings, **more):
    from ray.serve.config import AutoscalingConfig

    return AutoscalingConfig(
        min_replicas=1,
        max_replicas=1000,
        target_ongoing_requests=own.target_ongoing_requests,
        upscale_delay_s=own.upscale_delay_s,
        downscale_delay_s=own.downscale_delay_s,
        **more,
    )


def test_the_defaults_are_serves():
    from ray.serve._private.config import DeploymentConfig
    from ray.serve.config import AutoscalingConfig

    ours, theirs = QueueOnlySettings(), AutoscalingConfig()
    assert ours.target_ongoing_requests == theirs.get_target_ongoing_requests()
    for name in ("upscale_delay_s", "downscale_delay_s", "look_back_period_s"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.metrics_interval_s == theirs.metrics_interval_s
    assert ours.max_ongoing_requests == DeploymentConfig().max_ongoing_requests


class _Context:
    """What Serve's policy reads of its context."""

    def __init__(self, config, total: float, running: int, target: int) -> None:
        self.config = config
        self.total_num_requests = total
        self.current_num_replicas = running
        self.target_num_replicas = target


@settings(max_examples=150, deadline=None)
@given(
    total=some.floats(0, 500),
    running=some.integers(1, 60),
    target=some.integers(1, 60),
    per_replica=some.sampled_from([0.5, 1.0, 1.5, 2.0, 5.0]),
)
def test_wishes_equal_serves(total, running, target, per_replica):
    from ray.serve import autoscaling_policy as theirs

    own = QueueOnlySettings(target_ongoing_requests=per_replica)
    context = _Context(_ray_config(own), total, running, target)
    wish, _ = theirs.replica_queue_length_autoscaling_policy(context)
    scaled = theirs._apply_scaling_factors(wish, running, context.config)
    assert desired(total, running, target, own) == max(0, scaled)


@pytest.mark.parametrize("seed", range(20))
def test_decisions_over_time_equal_serves(seed):
    from ray.serve import autoscaling_policy as theirs

    draw = random.Random(seed)
    own = QueueOnlySettings(
        target_ongoing_requests=draw.choice([0.7, 1.0, 2.0]),
        upscale_delay_s=draw.choice([0.0, 10.0, 30.0]),
        downscale_delay_s=draw.choice([5.0, 60.0, 600.0]),
    )
    config, delays = _ray_config(own), Delays(own)
    state: dict[str, Any] = {}
    target, level, changes = 4, 8.0, 0
    now = 1000.0
    for _ in range(1500):
        now += draw.choice([0.5, 1.0, 1.0, 2.0])
        if draw.random() < 0.02:
            level = draw.uniform(0, 60)
        total = max(0.0, level + draw.gauss(0, 1))
        running = max(1, target + draw.choice([0, 0, -1]))
        wish, _ = theirs.replica_queue_length_autoscaling_policy(
            _Context(config, total, running, target)
        )
        wish = max(0, theirs._apply_scaling_factors(wish, running, config))
        expected, state = theirs._apply_delay_logic(wish, target, config, state, _now=now)
        decided = delays.decide(desired(total, running, target, own), target, now)
        assert decided == expected
        changes += decided != target
        target = max(1, min(40, decided))
    assert changes > 0


@pytest.mark.parametrize("seed", range(10))
def test_the_mean_of_what_was_pushed_equals_serves(seed):
    from ray.serve._private.metrics_utils import TimeStampedValue, aggregate_timeseries
    from ray.serve.config import AggregationFunction

    draw = random.Random(seed)
    own = QueueOnlySettings()
    mean, pushed_at = OngoingMean(own), -1e9
    recorded: list[tuple[float, float]] = []
    pushed: list[tuple[float, float]] = []
    for second in range(200):
        now, value = float(second), float(draw.randint(0, 30))
        mean.record(now, value)
        recorded = [one for one in [*recorded, (now, value)] if one[0] >= now - 30]
        if now - pushed_at >= 10:
            pushed, pushed_at = list(recorded), now
        later = now + 0.5
        expected = aggregate_timeseries(
            [TimeStampedValue(at, one) for at, one in pushed],
            aggregation_function=AggregationFunction.MEAN,
            last_window_s=later - pushed[-1][0],
        )
        assert mean.value(later) == pytest.approx(expected)


class _Stub:
    """A replica with a queue and nothing else."""

    def __init__(self, id: str, card: int) -> None:
        self.id = id
        self.card = card
        self.ongoing = self.accepted = self.version = 0
        self.accepted_s, self.speed = 0.0, 1.0

    def own_s(self, request) -> float:
        return 1.0

    def accept(self, request, now):
        self.ongoing += 1


def test_power_of_two_takes_the_shorter_queue_and_fills_every_place():
    router = PowerOfTwo("seed")
    spec = PoolSpec("denoiser", "denoise", "L4", 1, 10, 60.0, 3)
    make: Any = _Stub
    request: Any = object()
    pool = Pool(spec, router, make, list(range(10)), "seed", lambda *event: None)
    pool.start_now(10, 0.0)
    for _ in range(10):
        pool.offer(request, 0.0)
    # Two choices leave no queue of three where one choice often would.
    assert max(one.ongoing for one in pool.replicas) <= 2
    for _ in range(40):
        pool.offer(request, 0.0)
    assert [one.ongoing for one in pool.replicas] == [3] * 10
    assert len(pool.waiting) == 20


@pytest.mark.parametrize(
    ("replicas", "value", "target", "expected"),
    [(10, 60, 60, 10), (10, 65, 60, 10), (10, 67, 60, 12), (10, 30, 60, 5), (3, 90, 45, 6)],
)
def test_the_horizontal_autoscalers_formula(replicas, value, target, expected):
    assert wanted(replicas, value, target) == expected
