"""What the journal says after chaos, beside what clients were told and an undisturbed run."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import Collection, Sequence
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from loadtest.chaos_load import VARIANTS, Load, request
from serve.claims import Claims
from serve.config import StorageSettings
from serve.errors import KelvinError
from serve.jobs import JobJournal
from serve.lease_store import LeaseStore
from serve.requests import JobRecord
from serve.storage import ObjectStore

_PATIENCE_S = 120.0
# DESIGN.md, "the same picture", Pixels.
_MOST_OFF = 1
_LEAST_SHARE = 0.999


def undisturbed_pictures(url: str) -> list[NDArray[np.uint8]]:
    """Return what each of the requests makes while nothing is hurt."""
    return [_undisturbed(url, variant) for variant in range(VARIANTS)]


def _undisturbed(url: str, variant: int) -> NDArray[np.uint8]:
    answer = httpx.post(
        f"{url}/v1/generate", json=request(variant), trust_env=False, timeout=_PATIENCE_S
    )
    pixels = _pixels_of(answer.raise_for_status().json()["images"][0])
    if pixels is None:
        raise RuntimeError("a picture of the undisturbed run is missing")
    return pixels


def _pixels_of(image: dict[str, Any]) -> NDArray[np.uint8] | None:
    """Return a stored picture; None: it is not there, or not what its result says."""
    answer = httpx.get(image["url"], trust_env=False, timeout=_PATIENCE_S)
    if answer.status_code != 200 or hashlib.sha256(answer.content).hexdigest() != image["sha256"]:
        return None
    with Image.open(io.BytesIO(answer.content)) as picture:
        return np.asarray(picture.convert("RGB"))


class Books:
    """The journal in one store, read from outside of the service.

    Args:
        storage: Where it lies.
    """

    def __init__(self, storage: StorageSettings) -> None:
        self._store = ObjectStore(storage)
        self._journal = JobJournal(self._store)
        self._claims = Claims(self._store, self._journal)
        self._leases = LeaseStore(self._store)

    def jobs(self) -> set[str]:
        """Return the ids of all jobs that were ever accepted."""
        keys = asyncio.run(self._store.list_keys("jobs/"))
        return {key.split("/")[1] for key in keys if key.endswith("/request.json")}

    def verdict(
        self, load: Load, before: Collection[str], undisturbed: Sequence[NDArray[np.uint8]]
    ) -> dict[str, Any]:
        """Return what is wrong, which is nothing, and how many jobs there were.

        Args:
            load: Whose jobs.
            before: Jobs that are none of its.
            undisturbed: What each of its requests makes.
        """
        missing, different, failed, contradicted = [], [], [], []
        for job_id, told in load.ended.items():
            if told["status"] != "succeeded":
                failed.append({"id": job_id, "status": told["status"], "error": told["error"]})
                continue
            record = asyncio.run(self._journal.read(job_id))
            if record is None or _end_of(record) != _end_of(JobRecord.model_validate(told)):
                contradicted.append(job_id)
                continue
            pixels = _pixels_of(record.model_dump(mode="json")["result"]["images"][0])
            if pixels is None:
                missing.append(job_id)
                continue
            off = np.abs(pixels.astype(int) - undisturbed[load.accepted[job_id]]).max(axis=-1)
            if float((off <= _MOST_OFF).mean()) < _LEAST_SHARE:
                different.append(job_id)
        unknown = self.jobs() - set(before) - set(load.accepted)
        pending = asyncio.run(self._journal.pending())
        wrong = {
            "not_ended": self.what_is_known(set(load.accepted) - set(load.ended)),
            "failed": failed,
            "missing_pictures": missing,
            "different_pictures": different,
            "told_otherwise_than_on_record": contradicted,
            "accepted_twice": sorted(unknown),
            "still_pending": pending,
        }
        return {
            "jobs": load.number,
            "accepted": len(load.accepted),
            "succeeded": len(load.ended) - len(failed),
            **wrong,
            "calls_refused_or_lost": load.unheard,
            "ok": len(load.ended) == load.number and not any(wrong.values()),
        }

    def what_is_known(self, jobs: Collection[str]) -> list[dict[str, Any]]:
        """Return what the journal says of jobs that did not end."""
        return [asyncio.run(self._known(job_id)) for job_id in sorted(jobs)]

    async def _known(self, job_id: str) -> dict[str, Any]:
        try:
            record = await self._journal.read(job_id)
            claim = await self._claims.newest(job_id)
            leases = await self._leases.etags()
            pending = await self._journal.pending()
        except KelvinError as error:
            return {"id": job_id, "unreadable": str(error)}
        return {
            "id": job_id,
            "on_record": None if record is None else record.status,
            "is_pending": job_id in pending,
            "claimed_by": claim.owner,
            "attempt": claim.attempt,
            "claimant_has_a_lease": claim.owner in leases,
            "leases": sorted(leases),
        }


def _end_of(record: JobRecord) -> object:
    images = () if record.result is None else record.result.images
    return record.status, [(image.s3_uri, image.sha256) for image in images]
