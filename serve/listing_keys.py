"""Keys under which a store lists a tenant's jobs from the newest on."""

from __future__ import annotations

from serve.job_ids import checked, is_job_id
from serve.tenants import checked_tenant

LISTING = "listing/"
_DIGITS = 32
_LAST = 16**_DIGITS - 1


def listing_prefix(tenant: str, *, by_door: bool = False) -> str:
    """Return what the keys of a tenant's jobs begin with.

    Args:
        tenant: Whose.
        by_door: Those jobs that a door lists too are meant (`serve.attachment`), else the others.
    """
    return f"{LISTING}{checked_tenant(tenant)}{'.door' if by_door else ''}/"


def listing_key(job_id: str, tenant: str, *, by_door: bool = False) -> str:
    """Return a job's key: of two jobs, the later one's comes first.

    Raises:
        JobNotFound: The id is malformed.
    """
    countdown = _LAST - int(checked(job_id), 16)
    return f"{listing_prefix(tenant, by_door=by_door)}{countdown:0{_DIGITS}x}"


def job_of(key: str) -> str | None:
    """Return the job whose key this is; None: it is no such key."""
    countdown = key.rsplit("/", 1)[-1]
    return f"{_LAST - int(countdown, 16):0{_DIGITS}x}" if is_job_id(countdown) else None
