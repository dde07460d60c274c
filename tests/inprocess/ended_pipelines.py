"""Pipelines that end without a word, and jobs that end though theirs did."""

from __future__ import annotations

from serve.errors import RecordUnreadable
from serve.jobs import JobJournal
from serve.pipeline import Pipeline
from serve.requests import JobRecord
from tests.inprocess.polling import until

LEASE_S = 3.0
"""Of the Pipelines that the fixture `make_leased` makes."""


def stop(pipeline: Pipeline) -> None:
    """Let a Pipeline do no more, as if its process were gone."""
    for task in pipeline._jobs.keeping._tasks:
        task.cancel()
    for job in pipeline._live.values():
        assert job._life is not None
        job._life.cancel()


async def ended(journal: JobJournal, job_id: str) -> JobRecord:
    """Return what became of a job, once it is over."""

    async def over() -> JobRecord | None:
        try:
            record = await journal.read(job_id)
        except RecordUnreadable:
            return None
        return record if record is not None and record.is_over else None

    found: JobRecord = await until(over)
    return found
