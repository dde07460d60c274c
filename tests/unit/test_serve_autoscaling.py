"""Between Serve's autoscaler and the plan: what it is told, what it answers, and never an error."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig

from cluster import autoscaling, serve_planner
from cluster.autoscaling import PlanSettings
from cluster.autoscaling_news import NewsWriter
from cluster.pool_state import ReplicaState
from cluster.reported_numbers import as_numbers
from cluster.serve_autoscaling import ApplicationPolicy, PoolPolicy
from cluster.serve_planner import Planner
from cluster.serve_states import PoolFacts, PoolWatch
from serve.app import replicas_of
from serve.config import PoolSettings
from serve.heat_settings import AutoscalingSettings

FACTS = PoolFacts("denoiser", "denoise", "m", "H100", 1.0, 1.0, 60.0)


@dataclass(frozen=True)
class Replica:
    unique_id: str


@dataclass
class Context:
    """Ray's AutoscalingContext, as far as it is used."""

    running_replicas: list[Replica]
    target_num_replicas: int = 3
    capacity_adjusted_min_replicas: int = 1
    capacity_adjusted_max_replicas: int = 9
    total_num_requests: float = 0.0
    total_queued_requests: float = 0.0
    app_name: str = "app"
    raw_metrics: Any = field(default_factory=dict)
    config: Any = None


def replicas(*names: str) -> list[Replica]:
    return [Replica(name) for name in names]


def reported(at: float, **states: ReplicaState) -> dict[str, dict[Replica, list[Any]]]:
    """Return raw metrics in which each replica has told twice; the newer one counts."""
    series: dict[str, dict[Replica, list[Any]]] = {}
    for name, state in states.items():
        for metric, value in as_numbers(state).items():
            points = [SimpleNamespace(timestamp=at - 0.4, value=-1.0)]
            points.append(SimpleNamespace(timestamp=at, value=value))
            series.setdefault(metric, {})[Replica(name)] = points
    return series


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_newest_report_counts_with_its_age_by_our_own_clock():
    watch = PoolWatch(FACTS)
    state = ReplicaState("a", waiting_s=4.0, accepted=2.0, accepted_s=6.0, margin_c=3.0)
    # The replica's clock is years away from ours.
    context = Context(replicas("a"), raw_metrics=reported(5e9, a=state))
    (seen,) = watch.state(context, 10.0).replicas
    assert (seen.waiting_s, seen.margin_c, seen.age_s) == (4.0, 3.0, 0.0)
    made = watch.state(context, 17.0)
    assert made.replicas[0].age_s == 7.0
    assert made.request_s == 3.0
    context.raw_metrics = reported(5e9 + 1, a=state)
    assert watch.state(context, 18.0).replicas[0].age_s == 0.0


def test_what_a_report_no_longer_says_is_forgotten():
    watch = PoolWatch(FACTS)
    series = reported(7.0, a=ReplicaState("a", margin_c=2.0, slowdown=3.0, accepted=1.0))
    for name in ("accepted", "waiting_s"):
        series[name][Replica("a")].append(SimpleNamespace(timestamp=8.0, value=1.0))
    (seen,) = watch.state(Context(replicas("a"), raw_metrics=series), 0.0).replicas
    assert (seen.waiting_s, seen.margin_c, seen.slowdown) == (1.0, None, None)


def test_replicas_that_tell_nothing_share_what_is_left_of_the_requests():
    watch = PoolWatch(FACTS)
    context = Context(
        replicas("a", "b", "c"),
        total_num_requests=10.0,
        total_queued_requests=1.0,
        raw_metrics=reported(1.0, a=ReplicaState("a", requests=3.0)),
    )
    made = watch.state(context, 0.0)
    assert [each.requests for each in made.replicas] == [3.0, 3.0, 3.0]
    assert made.queued == 1.0
    nothing: list[dict[str, Any] | None] = [None, {}]
    for metrics in nothing:
        context.raw_metrics = metrics
        assert len(watch.state(context, 0.0).replicas) == 3


def planner(clock: Clock, news: list[Mapping[str, Any]]) -> Planner:
    return Planner("app", PlanSettings(), put_news=news.append, clock=clock)


def busy(waiting_s: float) -> ReplicaState:
    return ReplicaState("a", waiting_s=waiting_s, requests=50.0, accepted=50.0, accepted_s=500.0)


def test_a_backlog_adds_replicas_and_the_reason_is_told_once():
    clock, news = Clock(), list[Mapping[str, Any]]()
    made = planner(clock, news)
    context = Context(replicas("a"), target_num_replicas=1, raw_metrics=reported(1.0, a=busy(900)))
    (wanted,) = made.targets([(context, FACTS)])
    assert 1 < wanted <= 9
    assert made.targets([(context, FACTS)]) == [wanted], "Serve asks ten times a second"
    context.target_num_replicas = wanted
    clock.now += 1.0
    made.targets([(context, FACTS)])
    (change,) = news[-1]["changes"]
    assert (change["before"], change["after"]) == (1, wanted)
    assert "denoiser" in change["reason"]
    shown = news[-1]["pools"]["denoiser"]
    assert shown["target"] == wanted
    assert shown["replicas"] == 1
    json.dumps(news[-1])


def test_pools_that_ask_one_by_one_are_planned_together(monkeypatch: pytest.MonkeyPatch):
    seen: list[set[str]] = []
    real = autoscaling.plan

    def spied(pools: Any, *others: Any) -> Any:
        seen.append({pool.name for pool in pools})
        return real(pools, *others)

    monkeypatch.setattr(serve_planner, "plan", spied)
    clock = Clock()
    made = planner(clock, [])
    others = PoolFacts("decoder", "decode", "m", "H100", 1.0, 1.0, 60.0)
    for _ in range(10):
        made.targets([(Context(replicas("a", "b", "c")), FACTS)])
        made.targets([(Context(replicas("d", "e", "f")), others)])
        clock.now += 0.1
    assert seen[-1] == {"denoiser", "decoder"}
    assert len(seen) <= 4, "twice a second, however often Serve asks"
    clock.now += 60.0
    made.targets([(Context(replicas("a", "b", "c")), FACTS)])
    assert seen[-1] == {"denoiser"}, "a pool that was removed no longer counts"


def test_what_serve_changes_by_itself_is_told():
    clock, news = Clock(), list[Mapping[str, Any]]()
    made = planner(clock, news)
    context = Context([], target_num_replicas=0, capacity_adjusted_min_replicas=0)
    assert made.targets([(context, FACTS)]) == [0]
    # At 0 replicas Serve starts one as soon as a request waits, without asking.
    context.target_num_replicas, context.total_num_requests = 1, 1.0
    context.total_queued_requests = 1.0
    clock.now += 0.1
    assert made.targets([(context, FACTS)]) == [1]
    (change,) = news[-1]["changes"]
    assert (change["before"], change["after"]) == (0, 1)
    assert "Ray Serve" in change["reason"]


@pytest.mark.parametrize(
    "broken",
    [
        {"running_replicas": None},
        {"raw_metrics": {"accepted": 3}},
        {"raw_metrics": {"accepted": {Replica("a"): [SimpleNamespace(timestamp=None, value="x")]}}},
        {"total_queued_requests": "many", "total_num_requests": None},
        {"capacity_adjusted_min_replicas": None},
    ],
    ids=str,
)
def test_nothing_that_serve_says_raises(broken: dict[str, Any]):
    context: Any = Context(replicas("a"), target_num_replicas=3)
    vars(context).update(broken)
    context.config = SimpleNamespace(policy=SimpleNamespace(policy_kwargs=kwargs_of(3)))
    assert isinstance(PoolPolicy(**kwargs_of(3))(context)[0], int)
    wanted, states = ApplicationPolicy()({"d": context})
    assert isinstance(wanted["d"], int)
    assert states == {"d": {}}


def test_what_is_not_understood_leaves_the_replicas_as_they_are():
    context: Any = Context(replicas("a"), target_num_replicas=3)
    assert PoolPolicy({"no": "such fact"}, {})(context) == (3, {})
    assert ApplicationPolicy()({"d": context}) == ({"d": 3}, {"d": {}})
    assert ApplicationPolicy()({}) == ({}, {})


class Heard(logging.Handler):
    """Keeps what a logger was told."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def tracebacks(self) -> int:
        return sum(record.exc_info is not None for record in self.records)


def test_a_plan_that_fails_is_told_once_a_minute(monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any) -> Any:
        raise ZeroDivisionError("of the plan itself")

    clock, news, heard = Clock(), list[Mapping[str, Any]](), Heard()
    made = planner(clock, news)
    context = Context(replicas("a"), target_num_replicas=3)
    monkeypatch.setattr(autoscaling, "_plan", fails)
    logger = logging.getLogger("ray.serve.kelvin")
    monkeypatch.setattr(logger, "handlers", [heard])
    for _ in range(50):
        assert made.targets([(context, FACTS)]) == [3]
        clock.now += 1.0
    assert heard.tracebacks == 1
    assert "of the plan itself" in news[-1]["warnings"][0]
    clock.now += 60.0
    made.targets([(context, FACTS)])
    assert heard.tracebacks == 2


def kwargs_of(most: int) -> dict[str, Any]:
    pool = PoolSettings(name="denoiser", min_replicas=1, max_replicas=most)
    config = replicas_of(AutoscalingSettings(), "m", "denoise", pool)["autoscaling_config"]
    assert isinstance(config, AutoscalingConfig)
    kwargs: dict[str, Any] = config.policy.policy_kwargs
    return kwargs


def test_what_the_builder_tells_each_pool_is_what_the_policy_takes():
    kwargs = kwargs_of(4)
    assert PoolFacts(**kwargs["pool"]).kind == "CPU"
    settings = AutoscalingSettings().model_dump(exclude={"policy"})
    assert kwargs["settings"] == settings
    assert set(settings) <= set(asdict(PlanSettings())), "none is passed over in silence"
    assert PlanSettings(**settings) == PlanSettings(), "their defaults agree"


def test_fixed_pools_and_serves_own_policy_are_left_to_serve():
    fixed = PoolSettings(name="denoiser", num_replicas=2)
    assert replicas_of(AutoscalingSettings(), "m", "denoise", fixed) == {"num_replicas": 2}
    scaled = PoolSettings(name="denoiser", min_replicas=1, max_replicas=4)
    config = replicas_of(AutoscalingSettings(policy="queue"), "m", "denoise", scaled)
    assert config == {
        "autoscaling_config": AutoscalingConfig(min_replicas=1, max_replicas=4, initial_replicas=1)
    }


def test_news_are_written_by_a_thread_and_a_failure_does_not_end_it():
    written: list[tuple[str, Any]] = []
    arrived = threading.Event()

    def write(application: str, data: bytes) -> None:
        if not written:
            written.append((application, None))
            arrived.set()
            raise ConnectionError("the store is away")
        written.append((application, json.loads(data)))
        arrived.set()

    writer = NewsWriter("app", write=write)
    for snapshot in ({"at": 1}, {"at": 2}):
        writer.put(snapshot)
        assert arrived.wait(30)
        arrived.clear()
    assert written == [("app", None), ("app", {"at": 2})]
