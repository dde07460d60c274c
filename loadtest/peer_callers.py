"""Asks the arms of the comparison on a CPU for pictures, in an open loop, and keeps what came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

from deployments.builtin.world import Example
from loadtest.lean_http import LeanClient

_LONGEST_S = 300.0


@dataclass(frozen=True)
class Job:
    """One picture to be asked for, 256 x 256, with guidance 4 and Euler steps."""

    example: Example
    steps: int
    seed: int


@dataclass(frozen=True)
class Served:
    """What became of one job; times in seconds, from when it was due."""

    job: Job
    at: float  # of the run
    late_s: float
    seconds: float
    picture: bytes | None
    failure: str = ""


class Caller:
    """Asks one arm; an asynchronous context.

    Args:
        arm: `kelvin`, or a peer.
        url: Of its server.
    """

    def __init__(self, arm: str, url: str) -> None:
        self._is_kelvin = arm == "kelvin"
        self._clients = {url: LeanClient(url)}
        self._url = url

    async def __aenter__(self) -> Caller:
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients.values():
            await client.__aexit__(None, None, None)

    async def picture(self, job: Job) -> bytes:
        """Return a picture's file; from Kelvin's store, as its callers fetch it.

        Raises:
            RuntimeError: Something else came back.
            OSError: Nothing did.
        """
        scale = 4.0
        if not self._is_kelvin:
            asked = {"prompt": job.example.prompt, "steps": job.steps, "seed": job.seed}
            path = "/imagine?" + urlencode(asked | {"scale": scale})
            return await self._ask(self._url, "GET", path)
        body = {
            "prompt": job.example.prompt,
            "num_inference_steps": job.steps,
            "seed": job.seed,
            "guidance_scale": scale,
            "sampler": "euler",
            "scheduler": "normal",
        }
        reply = await self._clients[self._url].ask("POST", "/v1/generate", body)
        if reply.status != 200:
            raise RuntimeError(f"{reply.status}: {reply.body[:120].decode(errors='replace')}")
        where = urlsplit(reply.json()["images"][0]["url"])
        return await self._ask(
            f"{where.scheme}://{where.netloc}", "GET", f"{where.path}?{where.query}"
        )

    async def _ask(self, url: str, method: str, path: str) -> bytes:
        client = self._clients.setdefault(url, LeanClient(url))
        reply = await client.ask(method, path)
        if reply.status != 200:
            raise RuntimeError(f"{reply.status}: {reply.body[:120].decode(errors='replace')}")
        return reply.body

    async def offer(self, jobs: Sequence[Job], times: Sequence[float]) -> list[Served]:
        """Ask for each job when it is due, whatever became of the others.

        Args:
            jobs: In order.
            times: Seconds of the run at which they are due, rising.
        """
        began = time.monotonic()

        async def one(job: Job, at: float) -> Served:
            late_s = time.monotonic() - began - at
            picture: bytes | None = None
            failure = ""
            try:
                async with asyncio.timeout(_LONGEST_S):
                    picture = await self.picture(job)
            except (OSError, RuntimeError, ValueError, TimeoutError) as error:
                failure = f"{type(error).__name__}: {error}"
            return Served(job, at, late_s, time.monotonic() - began - at, picture, failure)

        async with asyncio.TaskGroup() as group:
            asked = []
            for job, at in zip(jobs, times, strict=True):
                await asyncio.sleep(max(began + at - time.monotonic(), 0.0))
                asked.append(group.create_task(one(job, at)))
        return [each.result() for each in asked]


def offer(arm: str, url: str, jobs: Sequence[Job], times: Sequence[float]) -> list[Served]:
    """Do so on an event loop of its own; as `Caller.offer`."""

    async def run() -> list[Served]:
        async with Caller(arm, url) as caller:
            return await caller.offer(jobs, times)

    return asyncio.run(run())


def one_after_the_other(arm: str, url: str, jobs: Sequence[Job]) -> list[Served]:
    """Ask for each job once the one before has come."""

    async def run() -> list[Served]:
        async with Caller(arm, url) as caller:
            return [served for job in jobs for served in await caller.offer([job], [0.0])]

    return asyncio.run(run())
