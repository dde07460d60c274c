"""Tries each thing that Kelvin needs of an object store, one by one, and says what is missing.

For `kelvin doctor` and for start-up: few tries and short timeouts, so that a store that is down is
told in seconds. It writes one small object under `probe/` and removes it again.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import httpx

from serve.config import Settings, StorageSettings
from serve.errors import StorageUnavailable
from serve.loopback import is_loopback
from serve.storage import ObjectStore
from serve.storage_errors import host_of

_CONNECT_S = 3.0
_READ_S = 5.0
_ATTEMPTS = 2
_DATA = b"kelvin was here\n"
_ANOTHER_JOURNAL = (
    "a store with conditional writes: AWS S3, MinIO, SeaweedFS, R2; for the journal alone in "
    "journal.storage; or journal.enabled=false, and jobs die with their process"
)


@dataclass(frozen=True)
class Check:
    """What one step has found."""

    name: str
    ok: bool
    detail: str
    remedy: str | None = None  # what to do; None when ok


_Step = Callable[[ObjectStore, str], Awaitable[Check]]


async def probe_stores(settings: Settings) -> tuple[Check, ...]:
    """Try the store of pictures and the journal's, which mostly are one.

    Returns:
        The checks of `probe`; of a store that is the journal's alone, named journal_...
    """
    journal = settings.journal
    if journal.storage is None or not journal.enabled:
        return await probe(settings.storage, journal=journal.enabled)
    pictures = await probe(settings.storage, journal=False)
    records = await probe(journal.storage, pictures=False)
    return *pictures, *(replace(check, name=f"journal_{check.name}") for check in records)


async def probe(
    settings: StorageSettings, *, journal: bool = True, pictures: bool = True
) -> tuple[Check, ...]:
    """Try one store.

    Args:
        settings: Of the store.
        journal: Whether records of jobs go there.
        pictures: Whether pictures go there.

    Returns:
        One check a step, in order. The first failed step is the last: those after it depend on it.
    """
    quick = settings.model_copy(
        update={
            "connect_timeout_s": min(settings.connect_timeout_s, _CONNECT_S),
            "read_timeout_s": min(settings.read_timeout_s, _READ_S),
            "max_attempts": min(settings.max_attempts, _ATTEMPTS),
            "url_expiry_s": 60,
        }
    )
    store = ObjectStore(quick)
    key = f"probe/{uuid.uuid4().hex}"
    checks: list[Check] = []
    try:
        for name, step in _STEPS:
            if (step in _FOR_JOURNAL and not journal) or (step in _FOR_PICTURES and not pictures):
                continue
            try:
                checks.append(await step(store, key))
            except StorageUnavailable as error:
                checks.append(Check(name, False, error.message, error.allowed))
            if not checks[-1].ok:
                break
    finally:
        store.close()
    return tuple(checks)


async def _reachable(store: ObjectStore, key: str) -> Check:
    await store.list_keys(key)
    where = host_of(store.settings.endpoint_url)
    return Check("s3_reachable", True, f"{where} answers; bucket {store.settings.bucket!r} exists")


async def _writable(store: ObjectStore, key: str) -> Check:
    await store.put(key, _DATA, "text/plain")
    return Check("s3_writable", True, f"wrote {store.s3_uri(key)}")


async def _readable(store: ObjectStore, key: str) -> Check:
    if await store.get(key) == _DATA and await store.list_keys(key) == [key]:
        return Check("s3_readable", True, "an object is read and listed as soon as it is written")
    return Check(
        "s3_readable",
        False,
        "an object just written is not what is read, or is not listed",
        "a store that is strongly consistent: AWS S3, MinIO, SeaweedFS, R2",
    )


async def _conditional_put(store: ObjectStore, key: str) -> Check:
    if await store.put(key, b"overwritten", "text/plain", if_absent=True):
        return Check(
            "s3_conditional_put",
            False,
            "If-None-Match: * is ignored, so a job could be published twice: pictures may lie "
            "there, the journal may not",
            _ANOTHER_JOURNAL,
        )
    return Check("s3_conditional_put", True, "If-None-Match: * is honoured (412)")


async def _conditional_replace(store: ObjectStore, key: str) -> Check:
    name = "s3_conditional_replace"
    found = await store.get_with_etag(key)
    if found is None or await store.swap(key, _DATA, "text/plain", '"not-its-etag"') is not None:
        return Check(
            name,
            False,
            "If-Match is ignored, so two Pipelines could hold one lease: pictures may lie there, "
            "the journal may not",
            _ANOTHER_JOURNAL,
        )
    if await store.swap(key, _DATA, "text/plain", found[1]) is None:
        return Check(
            name, False, "If-Match with the object's own ETag is refused", _ANOTHER_JOURNAL
        )
    return Check(name, True, "If-Match is honoured (412)")


async def _presigned_get(store: ObjectStore, key: str) -> Check:
    name, public = "s3_presigned_get", store.settings.public_endpoint_url
    where = host_of(public or store.settings.endpoint_url)
    url = store.presign(key)
    try:
        async with httpx.AsyncClient(timeout=_READ_S, trust_env=not is_loopback(url)) as client:
            answer = await client.get(url)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        if public is not None:
            # A public name often resolves for callers only.
            return Check(name, True, f"not verified: {where} cannot be reached from here")
        return Check(
            name,
            False,
            f"GET of a presigned URL failed ({type(error).__name__})",
            f"{where} reachable by a plain HTTP client",
        )
    if answer.status_code == 200 and answer.content == _DATA:
        return Check(name, True, f"a plain HTTP client can fetch from {where}")
    return Check(
        name,
        False,
        f"GET of a presigned URL at {where} answered {answer.status_code}",
        "the endpoint that callers use in storage.public_endpoint_url; a proxy in front of it "
        "must pass the Host header on",
    )


async def _deletable(store: ObjectStore, key: str) -> Check:
    await store.delete(key)
    if await store.exists(key):
        return Check("s3_deletable", False, "a deleted object is still there", "s3:DeleteObject")
    return Check("s3_deletable", True, "the probe object is removed again")


_STEPS: tuple[tuple[str, _Step], ...] = (
    ("s3_reachable", _reachable),
    ("s3_writable", _writable),
    ("s3_readable", _readable),
    ("s3_conditional_put", _conditional_put),
    ("s3_conditional_replace", _conditional_replace),
    ("s3_presigned_get", _presigned_get),
    ("s3_deletable", _deletable),
)
_FOR_JOURNAL = (_conditional_put, _conditional_replace)
_FOR_PICTURES = (_presigned_get,)
