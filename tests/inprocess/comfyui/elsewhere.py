"""Prompts as other processes write them down."""

from __future__ import annotations

import uuid

from serve.http.comfyui_record import ChainRecord, PromptRecord
from serve.jobs import JobJournal
from serve.storage import ObjectStore
from serve.tenants import DEFAULT_TENANT
from tests.inprocess.comfyui.caller import workflow
from tests.inprocess.stand_in_stages import REQUEST


async def taken_elsewhere(store: ObjectStore, client: str, accepted_ms: int) -> PromptRecord:
    """Write a prompt down that is not over."""
    job_id = f"{accepted_ms:012x}{uuid.uuid4().hex[12:]}"
    chain = ChainRecord(job="", sampler="5", encoder="2", decoder="6", outputs={"7": "kelvin"})
    record = PromptRecord(
        id="",
        tenant=DEFAULT_TENANT,
        number=0,
        created_ms=accepted_ms,
        digest="",
        prompt=workflow(),
        extra_data={"client_id": client},
        chains=(chain,),
        node_errors={},
        warnings=(),
    )
    await JobJournal(store).accept(job_id, REQUEST, attachment=record.attachment())
    return record.held_by(job_id)


async def cancelled_elsewhere(store: ObjectStore, client: str, accepted_ms: int) -> PromptRecord:
    """Write a prompt down that is cancelled already."""
    record = await taken_elsewhere(store, client, accepted_ms)
    await JobJournal(store).request_cancel(record.job)
    return record
