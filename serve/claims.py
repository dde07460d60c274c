"""Who works on a job: whoever accepted it, or the last of those who took it over.

    pending/{shard}/{id}                its body names the Pipeline that accepted the job
    jobs/{id}/attempts/{number}.json    put if absent: the Pipeline that took it over then

A takeover is one conditional put of the next number, so that of several takers one goes ahead. This
keeps work from being done twice as a rule; that a job is published once does not rest on it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from serve.job_ids import checked
from serve.jobs import JobJournal
from serve.record_store import RecordStore

_JSON = "application/json"
_DIGITS = 6
_ATTEMPT = re.compile(rf"[0-9]{{{_DIGITS}}}\.json")


@dataclass(frozen=True)
class Claim:
    """The newest claim to a job.

    Attributes:
        owner: Name of the Pipeline's lease; None if the record does not say.
        attempt: 1 for whoever accepted it, then one more each time.
    """

    owner: str | None
    attempt: int


class Claims:
    """Claims to the jobs of one journal.

    Every method raises StorageUnavailable where the store does not answer.
    """

    def __init__(self, store: RecordStore, journal: JobJournal) -> None:
        self._store = store
        self._journal = journal

    async def newest(self, job_id: str) -> Claim:
        """Return the newest claim to a job."""
        prefix = _prefix(job_id)
        keys = [
            key
            for key in await self._store.list_keys(prefix)
            if _ATTEMPT.fullmatch(key.removeprefix(prefix))
        ]
        if not keys:
            return Claim(await self._journal.accepted_by(job_id), 1)
        attempt = int(keys[-1].removeprefix(prefix).removesuffix(".json"))
        return Claim(_owner(await self._store.get(keys[-1])), attempt)

    async def take(self, job_id: str, newest: Claim, owner: str) -> Claim | None:
        """Claim a job after the newest claim; None: somebody else was quicker."""
        claim = Claim(owner, newest.attempt + 1)
        key = f"{_prefix(job_id)}{claim.attempt:0{_DIGITS}d}.json"
        body = json.dumps({"pipeline": owner, "attempt": claim.attempt}).encode()
        return claim if await self._store.put(key, body, _JSON, if_absent=True) else None


def _prefix(job_id: str) -> str:
    return f"jobs/{checked(job_id)}/attempts/"


def _owner(body: bytes | None) -> str | None:
    try:
        content = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        return None
    owner = content.get("pipeline") if isinstance(content, dict) else None
    return owner if isinstance(owner, str) else None
