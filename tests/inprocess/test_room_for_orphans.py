"""Jobs of dead Pipelines and new requests leave each other room."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest

from serve import takeover as takeover_module
from serve.errors import Overloaded
from serve.job_ids import new_job_id
from serve.jobs import JobJournal
from serve.pipeline import Pipeline
from serve.running import RunningJob
from serve.served_models import ServedModel
from tests.inprocess.ended_pipelines import ended, stop
from tests.inprocess.polling import until
from tests.inprocess.stand_in_stages import REQUEST, StandIn


async def test_orphans_leave_room_for_new_work(
    make_leased: Callable[..., Pipeline], journal: JobJournal
):
    ids = sorted(new_job_id() for _ in range(4))
    for job_id in ids:
        await journal.accept(job_id, REQUEST, "gone-1")
    stages = StandIn()
    stages.gate.clear()
    # It takes three pictures at a time: one orphan, and the rest of the room is for new requests.
    pipeline = make_leased(stages)
    await pipeline.check_health()
    await stages.at_gate.wait()
    await pipeline._jobs.keeping._takeover.look()
    assert list(pipeline._live) == ids[:1]
    new = await pipeline.submit(REQUEST.model_copy(update={"num_images": 2}))
    stages.gate.set()
    for job_id in (new.id, *ids):
        assert (await ended(journal, job_id)).status == "succeeded"


async def test_new_requests_without_end_do_not_keep_orphans_waiting(
    make_leased: Callable[..., Pipeline], journal: JobJournal
):
    stages = StandIn()
    stages.gate.clear()
    # It takes three pictures at a time, and new requests have taken all places.
    pipeline = make_leased(stages)
    await pipeline.check_health()
    keeping = pipeline._jobs.keeping
    # Only when told to: two looks at a time do not happen.
    looking = next(task for task in keeping._tasks if task.get_name() == "takeover")
    looking.cancel()
    await asyncio.wait({looking})
    new = [(await pipeline.submit(REQUEST)).id for _ in range(3)]
    await journal.accept(orphan := new_job_id(), REQUEST, "gone-1")
    keeping._takeover.list_soon()
    await keeping._takeover.look()
    assert sorted(pipeline._live) == sorted(new)
    # The next place is the orphan's, however often another request asks for it.
    await pipeline.cancel(new.pop(0))

    async def is_taken_over() -> bool:
        with pytest.raises(Overloaded):
            await pipeline.submit(REQUEST)
        await keeping._takeover.look()
        return orphan in pipeline._live

    await until(is_taken_over)
    # While none waits, new requests may have every place.
    await pipeline.cancel(new.pop(0))
    await until(lambda: len(pipeline._live) < 3)
    new.append((await pipeline.submit(REQUEST)).id)
    stages.gate.set()
    for job_id in (orphan, *new):
        assert (await ended(journal, job_id)).status == "succeeded"


async def test_an_orphan_of_a_model_without_room_holds_up_none_of_another_model(
    make_leased: Callable[..., Pipeline], journal: JobJournal, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(takeover_module, "_TRIES_PER_LOOK", 2)
    stages = StandIn()
    stages.gate.clear()
    pipeline = make_leased(stages, recovered_at_once=8)
    await pipeline.check_health()
    keeping = pipeline._jobs.keeping
    # Only when told to: two looks at a time do not happen.
    looking = next(task for task in keeping._tasks if task.get_name() == "takeover")
    looking.cancel()
    await asyncio.wait({looking})
    _further(pipeline, monkeypatch)
    new = [(await pipeline.submit(REQUEST)).id for _ in range(3)]
    held_up = [f"{number:032x}" for number in range(4)]
    for job_id in held_up:
        await journal.accept(job_id, REQUEST, "gone-1")
    apart = REQUEST.model_copy(update={"model": "apart"})
    await journal.accept(other := f"{9:032x}", apart, "gone-1")
    keeping._takeover.list_soon()

    async def other_is_taken_over() -> bool:
        await keeping._takeover.look()
        return other in pipeline._live

    await until(other_is_taken_over)
    assert sorted(pipeline._live) == sorted([*new, other])
    # Of its own model the oldest comes first.
    await pipeline.cancel(new[0])
    await until(lambda: new[0] not in pipeline._live)
    await keeping._takeover.look()
    assert sorted(pipeline._live) == sorted([*new[1:], other, held_up[0]])
    with pytest.raises(Overloaded):
        await pipeline.submit(REQUEST)
    assert (await pipeline.submit(apart)).id in pipeline._live, "for that one none waits"
    stop(pipeline)


async def test_an_orphan_that_waits_halves_the_room_of_models_that_share_its_pools_alone(
    make_leased: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
):
    pipeline = make_leased(StandIn())
    models, admission = pipeline._jobs._models, pipeline._jobs._admission
    further = _further(pipeline, monkeypatch)
    for name in further:
        # Two of the three that may be.
        made = REQUEST.model_copy(update={"model": name, "num_images": 2})
        pipeline._live[name] = RunningJob(new_job_id(), made)
    asked = {name: REQUEST.model_copy(update={"model": name}) for name in further}
    for request in asked.values():
        await admission.admit(request)
    admission._halves.waited_for.add(models.own.facts.spec.name)
    await admission.admit(asked["apart"])
    with pytest.raises(Overloaded):
        await admission.admit(asked["beside"])


def _further(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> dict[str, ServedModel]:
    """Have two more models: one with pools of its own, and one beside the own one."""
    models = pipeline._jobs._models
    pools = {
        stage: {f"{name}-apart": handle for name, handle in handles.items()}
        for stage, handles in models.own.stages.pools.items()
    }

    def named(name: str) -> ServedModel:
        spec = models.own.facts.spec.model_copy(update={"name": name})
        return replace(models.own, facts=replace(models.own.facts, spec=spec))

    apart = replace(named("apart"), stages=SimpleNamespace(pools=pools))  # type: ignore[arg-type]
    further = {"apart": apart, "beside": named("beside")}

    async def find(name: str | None) -> ServedModel:
        return further.get(str(name), models.own)

    monkeypatch.setattr(models, "_further", further)
    monkeypatch.setattr(models, "find", find)
    return further
