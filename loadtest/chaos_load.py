"""Clients of a service that is being hurt: they submit until accepted, and ask until the end."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

VARIANTS = 6
_STEPS = 40
_AGAIN_S = 0.5
_SAMPLED_EVERY_S = 0.25
_ANSWER_WITHIN_S = 20.0
_OVER = ("succeeded", "failed", "cancelled")


def request(variant: int) -> dict[str, Any]:
    """Return one of a few requests, each of which always makes the same picture."""
    return {"prompt": f"picture {variant}", "num_inference_steps": _STEPS, "seed": variant}


@dataclass(frozen=True)
class Sample:
    """How far the jobs were."""

    at_s: float
    accepted: int
    ended: int


class Load:
    """So many jobs, so many of them under way at a time; a context manager.

    Its clients run in a thread of their own, so that whoever hurts the service may take its time.

    Args:
        url: Of the service, which keeps it when it starts again.
        number: Of jobs.
        at_once: Under way.
    """

    def __init__(self, url: str, number: int, at_once: int) -> None:
        self.number = number
        self.accepted: dict[str, int] = {}
        """Job id -> which of the requests it is."""
        self.ended: dict[str, dict[str, Any]] = {}
        """Job id -> its record, as it was told."""
        self.samples: list[Sample] = []
        self.unheard = 0
        """Calls that were refused or lost."""
        self.failure: BaseException | None = None
        """What no client expects, and ended them all."""
        self._url = url
        self._at_once = at_once
        self._key = secrets.token_hex(4)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos-load", daemon=True)
        self.began = time.monotonic()

    @property
    def now(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    @property
    def longest_silence_s(self) -> float:
        """Seconds between the ends of two jobs, at most."""
        longest = since = 0.0
        for before, after in zip(self.samples, self.samples[1:], strict=False):
            if after.ended > before.ended:
                longest = max(longest, after.at_s - since)
                since = after.at_s
        return longest

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._all())
        except BaseException as error:
            self.failure = error

    async def _all(self) -> None:
        sampling = asyncio.create_task(self._sample())
        async with asyncio.TaskGroup() as group:
            for worker in range(self._at_once):
                group.create_task(self._client(worker))
        sampling.cancel()
        with suppress(asyncio.CancelledError):
            await sampling

    async def _sample(self) -> None:
        while True:
            self.samples.append(Sample(self.now, len(self.accepted), len(self.ended)))
            await asyncio.sleep(_SAMPLED_EVERY_S)

    async def _client(self, worker: int) -> None:
        async with httpx.AsyncClient(
            base_url=self._url, trust_env=False, timeout=_ANSWER_WITHIN_S
        ) as http:
            for index in range(worker, self.number, self._at_once):
                accepted = await self._until_told(http, index)
                if accepted is None:
                    return
                job_id = str(accepted["id"])
                self.accepted[job_id] = index % VARIANTS
                ended = await self._until_told(http, index, job_id)
                if ended is None:
                    return
                self.ended[job_id] = ended

    async def _until_told(
        self, http: httpx.AsyncClient, index: int, job_id: str | None = None
    ) -> dict[str, Any] | None:
        """Submit until accepted, or ask for a job until it has ended; None: it is to stop."""
        while not self._stop.is_set():
            try:
                if job_id is None:
                    # The key makes one job of all tries.
                    answer = await http.post(
                        "/v1/jobs",
                        json=request(index % VARIANTS),
                        headers={"Idempotency-Key": f"chaos-{self._key}-{index}"},
                    )
                else:
                    answer = await http.get(f"/v1/jobs/{job_id}")
            except httpx.TransportError:
                self.unheard += 1
            else:
                if answer.status_code in (200, 202):
                    record: dict[str, Any] = answer.json()
                    if job_id is None or record["status"] in _OVER:
                        return record
                else:
                    self.unheard += 1
            await asyncio.sleep(_AGAIN_S)
        return None
