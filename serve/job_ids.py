"""Job ids: unique, sortable by time of acceptance, safe inside any key or URL.

Thirty-two lower-case hexadecimal digits: 48 bits of Unix milliseconds, then 80 random bits. Like
UUIDv7, without its version digits. Nothing else ever becomes part of a key.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from time import time, time_ns

from serve.errors import JobNotFound

_ID = re.compile(r"[0-9a-f]{32}")
_SHARD_DIGITS = 2  # 256 shards: what a restart lists is split evenly, whatever the time


def new_job_id() -> str:
    """Return an id no other job has."""
    return f"{time_ns() // 1_000_000 & (1 << 48) - 1:012x}{secrets.token_hex(10)}"


def first_job_id(since_ms: int) -> str:
    """Return the lowest id of a job accepted at a time in milliseconds of Unix time, or later."""
    return f"{max(0, since_ms) & (1 << 48) - 1:012x}{0:020x}"


def checked(job_id: str) -> str:
    """Return the id unchanged.

    Raises:
        JobNotFound: It is not of the form that `new_job_id` makes, so no job has it.
    """
    if not is_job_id(job_id):
        raise not_found(job_id)
    return job_id


def is_job_id(text: object) -> bool:
    """Return whether this is of the form that `new_job_id` makes."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def accepted_seconds_ago(job_id: str, now: float | None = None) -> float:
    """Return the age of a job by this machine's wall clock, in seconds, not below 0.

    For deadlines and retention, where seconds by which two machines' clocks differ matter little.

    Args:
        job_id: The job.
        now: Seconds of Unix time; the present if absent.
    """
    now = time() if now is None else now
    return max(0.0, now - int(checked(job_id)[:12], 16) / 1000)


def not_found(job_id: object) -> JobNotFound:
    """Return the error for an id that no job has."""
    return JobNotFound(
        "No job has this id.", field="id", value=job_id, allowed="an id that this service gave out"
    )


def shard(job_id: str) -> str:
    """Return the two digits under which a pending job is listed.

    Of a hash, because ids drawn in one hour all begin alike.
    """
    return hashlib.sha256(checked(job_id).encode()).hexdigest()[:_SHARD_DIGITS]
