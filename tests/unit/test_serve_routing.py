"""The router that Ray Serve makes: ranks by load, no herds, Serve's own choice without data."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ray.serve._private.common import (
    RequestMetadata,
)
from ray.serve._private.request_router.common import PendingRequest

from cluster.pool_state import ReplicaState
from cluster.process_boards import PoolBoard, board_of, kind_of
from cluster.routing import RoutedWork, RoutingSettings
from cluster.serve_routing import KelvinRouter
from cluster.work_keys import lora_key
from deployments.payloads import DenoiseJob, Latents, LoraUse, PromptEmbedding, Stamp
from serve.config import load_settings
from serve.pool_choice import PoolChoice
from tests.unit.pool_routers import Replica, router_of

_numbers = itertools.count()
STAMP = Stamp("r", 1, "fp32", 0.0, 0.1)
PROMPT = PromptEmbedding(np.zeros((2, 2), np.float32), np.zeros(2, np.float32), (), STAMP)
JOB = DenoiseJob("1", 0, 16, 16, 10, 1.0, "euler", "normal", 3.0, 0, PROMPT, None)


def new_router(*names: str) -> tuple[KelvinRouter, PoolBoard, list[Any]]:
    pool = f"pool-{next(_numbers)}"
    router = router_of(pool)
    replicas = [Replica(pool, name) for name in names]
    router.update_replicas(replicas)
    return router, board_of(pool), replicas


def pending(*args: Any) -> PendingRequest:
    number = f"request-{next(_numbers)}"
    return PendingRequest(list(args), {}, RequestMetadata(number, number))


def jobs_take(board: PoolBoard, seconds: float) -> None:
    board.sizes.learn(kind_of(JOB), JOB.num_inference_steps, seconds)


def named(ranks: list[list[Any]]) -> list[list[str]]:
    return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]


async def first_choice(router: KelvinRouter, replicas: list[Any]) -> str:
    return named(await router.choose_replicas(replicas, pending(JOB)))[0][0]


def told(name: str, waiting_s: float = 0.0, margin_c: float | None = None) -> ReplicaState:
    return ReplicaState(name, waiting_s=waiting_s, margin_c=margin_c, reading_age_s=0.0)


async def test_where_it_is_done_first_comes_first():
    router, board, replicas = new_router("busy", "free", "hot")
    board.heard(told("busy", waiting_s=20.0))
    board.heard(told("hot", margin_c=0.5))
    board.heard(told("free", margin_c=40.0))
    request = pending(JOB)
    ranks = named(await router.choose_replicas(replicas, request))
    assert ranks[0] == ["free"]
    assert sorted(itertools.chain(*ranks)) == ["busy", "free", "hot"]
    assert request.routing_context.should_backoff, "or Serve asks without a pause"


@pytest.mark.parametrize(("waiting_s", "first"), [(0.0, "has"), (0.2, "has"), (3.0, "lacks")])
async def test_who_has_the_lora_comes_first_unless_it_has_more_to_do_than_fetching_takes(
    waiting_s, first
):
    router, board, replicas = new_router("has", "lacks")
    jobs_take(board, 2.0)
    board.heard(replace(told("has", waiting_s), holds=frozenset({lora_key("ink")})))
    board.heard(told("lacks"))
    work = replace(JOB, loras=(LoraUse("ink", 1.0),))
    assert named(await router.choose_replicas(replicas, pending(work)))[0] == [first]


async def test_of_many_the_best_are_ranked_and_two_others_stand_by():
    names = [f"r{number}" for number in range(200)]
    router, board, replicas = new_router(*names)
    for number, name in enumerate(names):
        board.heard(told(name, waiting_s=2.0 * number))
    best, others, last = named(await router.choose_replicas(replicas, pending(JOB)))
    assert best == ["r0"]
    assert sorted(others) == ["r1", "r2", "r3"]
    assert len(set(last)) == 2
    assert not {*best, *others} & set(last)
    # Serve may offer fewer than there are: nobody else is named then.
    offered = replicas[1:4]
    ranks = named(await router.choose_replicas(offered, pending(JOB)))
    assert sorted(itertools.chain(*ranks)) == ["r1", "r2", "r3"]
    router.on_replica_actor_died(replicas[1].replica_id)
    left = [replicas[0], *replicas[2:]]
    for _ in range(20):
        assert "r1" not in itertools.chain(*named(await router.choose_replicas(left, pending(JOB))))


async def test_a_burst_goes_everywhere_before_any_of_it_is_sent():
    router, board, replicas = new_router("a", "b", "c", "d")
    board.heard(told("a"))
    first = Counter([await first_choice(router, replicas) for _ in range(40)])
    assert set(first) == set("abcd")
    assert max(first.values()) <= 12


async def test_idle_replicas_take_turns_whatever_their_baselines():
    router, board, replicas = new_router("a", "b")
    jobs_take(board, 0.1)
    first = []
    for _ in range(30):
        name = await first_choice(router, replicas)
        board.heard(ReplicaState(name, slowdown={"a": 0.5, "b": 0.9}[name], reading_age_s=None))
        first.append(name)
    assert min(Counter(first).values()) >= 5


async def test_who_is_asked_again_counts_once():
    router, board, replicas = new_router("a", "b")
    board.heard(told("a"))
    request = pending(JOB)
    for _ in range(10):
        await router.choose_replicas(replicas, request)
    others = Counter([await first_choice(router, replicas) for _ in range(9)])
    assert abs(others["a"] - others["b"]) <= 1


async def test_what_went_elsewhere_counts_there():
    router, board, replicas = new_router("a", "b")
    jobs_take(board, 0.1)
    board.heard(told("a", waiting_s=0.2))
    board.heard(told("b"))
    for _ in range(20):
        request = pending(JOB)
        assert await router.choose_replicas(replicas, request)
        router.on_request_routed(request, replicas[0].replica_id, None)
    (best,), *_ = named(await router.choose_replicas(replicas, pending(JOB)))
    assert best == "b"
    router.on_request_completed(replicas[0].replica_id, "never heard of it")


def test_a_slow_replica_that_fell_silent_is_tried_again():
    now = [100.0]
    board = PoolBoard(RoutingSettings(blur=0.0), clock=lambda: now[0])
    board.keep(["a", "b"])

    def shares() -> Counter[str]:
        board.forget_old_speeds()
        return Counter(board.loads.ranked(RoutedWork(1.0), now[0])[0] for _ in range(40))

    board.heard(ReplicaState("a", slowdown=3.0))
    board.heard(ReplicaState("b", slowdown=1.0))
    assert shares() == {"b": 40}
    now[0] += 14.0
    assert shares() == {"b": 40}
    now[0] += 2.0
    assert set(shares()) == {"a", "b"}
    board.heard(ReplicaState("a", slowdown=3.0))
    now[0] += 2.0
    assert shares() == {"b": 40}


async def test_work_waits_outside_while_all_have_enough_and_goes_to_who_starts_then():
    router, board, replicas = new_router("a", "b")
    router.initialize_state(pipelines=1, max_queued=8)
    jobs_take(board, 2.0)
    board.heard(told("a", waiting_s=11.0))
    board.heard(told("b", waiting_s=30.0))
    waiting = pending(JOB)
    assert await router.choose_replicas(replicas, waiting) == []
    assert waiting.routing_context.should_backoff, "or Serve asks without a pause"
    new = Replica(router._deployment_id.name, "new")
    router.update_replicas([*replicas, new])
    (best,), *_ = named(await router.choose_replicas([*replicas, new], waiting))
    assert best == "new"
    # Nothing of what replicas may still take is refused for want of room at the handle.
    router.update_replicas(replicas)
    board.heard(told("a", waiting_s=11.0))
    router._pending_requests_to_fulfill.extend(pending(JOB) for _ in range(5))
    assert await router.choose_replicas(replicas, pending(JOB))


async def test_what_was_sent_meanwhile_counts_once():
    router, board, replicas = new_router("a")
    jobs_take(board, 3.0)
    board.heard(told("a"))
    request = pending(JOB)
    request.future.set_result(replicas[0])
    assert await router.choose_replicas(replicas, request)
    assert board.loads.soonest(RoutedWork(3.0), board.clock()) == pytest.approx(3.0, abs=0.1)


async def test_what_waits_outside_ends_where_a_replica_gets_it():
    router, board, replicas = new_router("a")
    board.heard(told("a"))
    now = board.clock()
    for job in (first := replace(JOB, job_id="1"), second := replace(JOB, job_id="2")):
        board.outside.came(id(job), 3.0, now)
    assert board.outside.cool_s == 6.0
    await router.choose_replicas(replicas, pending(first))
    assert board.outside.cool_s == 3.0
    router.on_request_routed(pending(second), replicas[0].replica_id, None)
    assert board.outside.cool_s == 0.0


async def test_without_data_serve_chooses_by_queues():
    router, _, replicas = new_router("a", "b", "c")
    (rank,) = await router.choose_replicas(replicas, pending(JOB))
    assert len(rank) == 2


async def test_failures_are_serves_own_choice(monkeypatch: pytest.MonkeyPatch):
    router, board, replicas = new_router("a", "b", "c")
    board.heard(told("a"))
    for odd in (pending(), pending(None), pending("text", 3)):
        assert await router.choose_replicas(replicas, odd)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug")

    for name in ("ranked", "sent", "finished", "keep"):
        monkeypatch.setattr(board.loads, name, broken)
    (rank,) = await router.choose_replicas(replicas, pending(JOB))
    assert len(rank) == 2
    router.on_request_routed(pending(JOB), replicas[0].replica_id, None)
    router.on_request_completed(replicas[0].replica_id, "x")
    router.update_replicas(replicas[:1])
    router.on_replica_actor_died(replicas[0].replica_id)


async def test_a_replica_that_is_new_gets_work_before_it_told_anything():
    router, board, replicas = new_router("a", "b")
    board.heard(told("a", waiting_s=3.0))
    board.heard(told("b", waiting_s=3.0))
    new = Replica(router._deployment_id.name, "new")
    router.update_replicas([*replicas, new])
    (best,), *_ = named(await router.choose_replicas([*replicas, new], pending(JOB)))
    assert best == "new"


def test_the_pool_is_where_the_work_is_done_first():
    names = [f"pool-{next(_numbers)}" for _ in range(2)]
    fast, slow = (
        {"name": name, "kind_speed": speed} for name, speed in zip(names, (1.0, 0.1), strict=True)
    )
    choice = PoolChoice(load_settings(None, {"denoiser": [fast, slow]}))
    for name in names:
        board_of(name).keep([f"{name}-replica"])
    choice.learnt(names[0], JOB, Latents(np.zeros((16, 2, 2), np.float32), STAMP, cool_s=2.0))
    assert choice.pool("denoise", JOB) == names[0]
    choice.heard(names[0], told(f"{names[0]}-replica", waiting_s=60.0))
    assert choice.pool("denoise", JOB) == names[1], "a slow card that is free: 20 s, not 62"
    choice.heard(names[1], None)
    assert choice.pool("text") == "text-encoder"


def two_pools(**slow: Any) -> tuple[PoolChoice, str, str]:
    """Return the choice between a fast pool with one replica and an empty one."""
    full, empty = (f"pool-{next(_numbers)}" for _ in range(2))
    pools = [
        {"name": full, "kind_speed": 1.0},
        {"name": empty, "kind_speed": 1.0, "num_replicas": 0, "min_replicas": 0}
        | {"max_replicas": 3, "start_s": 10.0}
        | slow,
    ]
    choice = PoolChoice(load_settings(None, {"denoiser": pools}))
    board_of(full).keep(["a"])
    board_of(empty).keep([])
    choice.learnt(full, JOB, Latents(np.zeros((16, 2, 2), np.float32), STAMP, cool_s=2.0))
    return choice, full, empty


def test_an_empty_pool_takes_no_more_than_it_would_be_done_with_first():
    choice, full, empty = two_pools()
    choice.heard(full, told("a", waiting_s=20.0))
    sent = []
    with ExitStack() as calls:
        for number in range(40):
            job = replace(JOB, job_id=str(number))
            sent.append(calls.enter_context(choice.sending("denoise", job, job)))
            if sent[-1] == full:  # as its router does
                board = board_of(full)
                board.outside.went(id(job))
                board.loads.sent("a", board.work(job), board.clock())
    # 10 s until it has a replica, against 20 s: five more there, then in turns.
    assert sent[:5] == [empty] * 5
    assert 15 <= sent.count(full) <= 20
    assert board_of(empty).outside.cool_s == 0.0


def test_a_pool_whose_replica_does_not_come_is_as_far_as_it_has_been_waited_for(
    monkeypatch: pytest.MonkeyPatch,
):
    choice, full, empty = two_pools()
    now = [board_of(full).clock()]
    for name in (full, empty):
        monkeypatch.setattr(board_of(name), "clock", lambda: now[0])
    choice.heard(full, told("a", waiting_s=30.0))
    with choice.sending("denoise", JOB, JOB) as pool:
        assert pool == empty
        now[0] += 20.0
        assert not choice.is_vain(empty)
        now[0] += 40.0
        choice.heard(full, told("a", waiting_s=30.0))
        assert choice.is_vain(empty), "three times the time that a start takes"
        assert not choice.is_vain(full)
    # The first one was given up; 60 s were not enough for a replica to come.
    assert choice.pool("denoise", JOB) == full
    board_of(empty).keep(["came"])
    assert not choice.is_vain(empty)
    assert choice.pool("denoise", JOB) == empty


def test_a_pool_of_which_nobody_has_heard_is_worth_a_try(monkeypatch: pytest.MonkeyPatch):
    unheard_of, lost = (f"pool-{next(_numbers)}" for _ in range(2))
    pools = [{"name": unheard_of}, {"name": lost, "start_s": 3.0, "accelerator_type": "L4"}]
    choice = PoolChoice(load_settings(None, {"denoiser": pools}))
    now = [board_of(lost).clock()]
    monkeypatch.setattr(board_of(lost), "clock", lambda: now[0])
    board_of(lost).keep([])
    board_of(lost).outside.came(1, 1.0, now[0])
    now[0] += 60.0
    assert choice.is_vain(lost)
    assert choice.pool("denoise", JOB) == unheard_of, (
        "a thousand times slower than an L4, but there"
    )
    board_of(unheard_of).keep([])
    assert not choice.is_vain(lost), "neither has a replica"


def test_speeds_of_kinds_are_what_replicas_measured():
    choice, full, empty = two_pools(num_replicas=1, kind_speed=None, accelerator_type="L4")
    board_of(empty).keep(["b"])
    choice.heard(full, replace(told("a", waiting_s=30.0), step_s=0.1))
    assert choice.pool("denoise", JOB) == empty, "2 s of an H100 are 17 s by the table"
    choice.heard(empty, replace(told("b"), step_s=2.0))
    assert choice.pool("denoise", JOB) == full, "and 40 s as measured"


async def test_a_replica_that_is_behind_its_peers_gets_less():
    router, board, replicas = new_router("a", "b", "warm")
    jobs_take(board, 1.0)
    board.heard(replace(told("a", waiting_s=1.5), step_s=0.1))
    board.heard(replace(told("b", waiting_s=1.5), step_s=0.1))
    board.heard(replace(told("warm", waiting_s=1.0), step_s=0.3))
    assert await first_choice(router, replicas) in ("a", "b")


def test_without_routing_by_load_pools_are_drawn_by_what_they_can_do():
    pools = [{"name": "one", "kind_speed": 1.0}, {"name": "none", "kind_speed": 1e-6}]
    settings = load_settings(None, {"denoiser": pools, "routing": {"policy": "power_of_two"}})
    assert {PoolChoice(settings).pool("denoise", JOB) for _ in range(50)} == {"one"}
