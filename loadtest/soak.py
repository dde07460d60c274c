"""Thousands of jobs one after the other: nothing that a service holds may grow with them.

    python -m loadtest.soak --json

Starts Kelvin with `pico` on this machine and sends jobs of all kinds through HTTP, some of them
cancelled. Every few seconds it reads the memory and the open files of each process, what lies in
Ray's object store, and how many objects each prefix of the journal has; retention sweeps run
meanwhile. The first third warms up, with more jobs at a time: caches fill, and torch compiles
kernels for each size of batch, which on a CPU take some 10 MiB each. What comes after must be flat.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from loadtest import command_line
from loadtest.lean_http import LeanClient
from loadtest.overhead import machine
from loadtest.process_census import processes
from loadtest.results import STDERR, Results
from loadtest.soak_figures import WARM_UP, Sample, draw_soak, report_of, table_of
from serve.commands.output import stdout_is_for_json
from serve.commands.stopping import local_kelvin, stoppable
from serve.config import Settings, load_settings
from serve.storage import ObjectStore
from serve.sweep import Sweep

_AT_ONCE = 6
_AT_ONCE_WARMING_UP = 16  # so that all sizes of batch come about
_SAMPLE_S = 5.0
_SWEEP_S = 20.0
_KEPT_S = 20.0
_POLL_S = 0.2
_SHARE_CANCELLED = 0.1
_PREFIXES = ("pending/", "leases/", "jobs/", "images/", "idempotency/")
_LONGEST_JOB_S = 300.0


def mixed_request(number: int) -> dict[str, Any]:
    """Return one of many kinds of requests; the same number gives the same."""
    draw = random.Random(number)
    return {
        "prompt": f"soak {number}",
        "num_inference_steps": draw.choice((2, 8, 40)),
        "num_images": draw.choice((1, 1, 2)),
        "guidance_scale": draw.choice((1.0, 4.0)),
        "sampler": draw.choice(("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde")),
        "seed": number,
    }


class Soak:
    """One run; all of it on one event loop.

    Args:
        url: Of Kelvin.
        settings: Of the running Kelvin, with its store.
        number: Of jobs.
    """

    def __init__(self, url: str, settings: Settings, number: int) -> None:
        self._url = url
        self._store = ObjectStore(settings.storage)
        warm_up = int(WARM_UP * number)
        self._warm_up: Iterator[int] = iter(range(warm_up))
        self._numbers: Iterator[int] = iter(range(warm_up, number))
        self._number = number
        self._began = time.monotonic()
        self.samples: list[Sample] = []
        self.ended: dict[str, int] = {}  # how -> how many
        self.wrong: list[dict[str, Any]] = []

    @property
    def done(self) -> int:
        """Jobs that have ended."""
        return sum(self.ended.values())

    async def run(self) -> dict[str, int]:
        """Send all jobs, wait for their ends, sweep, and return what is left in each prefix."""
        side = [asyncio.create_task(self._watch()), asyncio.create_task(self._sweep_often())]
        try:
            async with LeanClient(self._url) as http:
                for numbers, at_once in (
                    (self._warm_up, _AT_ONCE_WARMING_UP),
                    (self._numbers, _AT_ONCE),
                ):
                    await asyncio.gather(*(self._send(http, numbers) for _ in range(at_once)))
        finally:
            for task in side:
                task.cancel()
            await asyncio.gather(*side, return_exceptions=True)
        await self._sample()
        await self._sweep(0.0)
        return await self._objects()

    async def _send(self, http: LeanClient, numbers: Iterator[int]) -> None:
        for number in numbers:
            reply = await http.ask("POST", "/v1/jobs", mixed_request(number))
            if reply.status != 202:
                self._end("not accepted", {"status": reply.status, "body": reply.json()})
                continue
            job_id = reply.json()["id"]
            cancelled = False
            if random.Random(f"cancel {number}").random() < _SHARE_CANCELLED:
                cancelled = (await http.ask("DELETE", f"/v1/jobs/{job_id}")).status == 200
            record = await self._ended(http, job_id)
            right = record["status"] == ("cancelled" if cancelled else "succeeded")
            self._end(record["status"], None if right else record)

    async def _ended(self, http: LeanClient, job_id: str) -> dict[str, Any]:
        async with asyncio.timeout(_LONGEST_JOB_S):
            while True:
                record: dict[str, Any] = (await http.ask("GET", f"/v1/jobs/{job_id}")).json()
                if record.get("status") in ("succeeded", "failed", "cancelled"):
                    return record
                await asyncio.sleep(_POLL_S)

    def _end(self, how: str, wrong: dict[str, Any] | None) -> None:
        self.ended[how] = self.ended.get(how, 0) + 1
        if wrong is not None:
            self.wrong.append(wrong)

    async def _watch(self) -> None:
        while True:
            await self._sample()
            newest = self.samples[-1]
            STDERR.print(
                f"{newest.at:.0f} s: {self.done} of {self._number} jobs have ended, "
                f"{sum(each.rss_bytes for each in newest.processes) / 2**20:.0f} MiB",
                highlight=False,
            )
            await asyncio.sleep(_SAMPLE_S)

    async def _sample(self) -> None:
        there = await asyncio.to_thread(processes)
        left = await asyncio.to_thread(_object_store_bytes)
        at, objects = time.monotonic() - self._began, await self._objects()
        self.samples.append(Sample(at, self.done, there, left, objects))

    async def _objects(self) -> dict[str, int]:
        found = await asyncio.gather(*map(self._store.list_keys, _PREFIXES))
        return {prefix: len(keys) for prefix, keys in zip(_PREFIXES, found, strict=True)}

    async def _sweep_often(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            await self._sweep(_KEPT_S)

    async def _sweep(self, older_than_s: float) -> None:
        await Sweep(self._store, self._store, older_than_s, time.time()).run()


def _object_store_bytes() -> float:
    """Return what lies in Ray's object store, as Ray tells."""
    name = "object_store_memory"
    there, free = ray.cluster_resources(), ray.available_resources()
    return float(there.get(name, 0.0) - free.get(name, 0.0))


def settings(folder: Path) -> Settings:
    """Return the settings of a Kelvin with pico on this machine."""
    return load_settings(
        overrides={
            "model": {"path": "pico"},
            "http": {"port": 0},
            "embedded_store": {"data_dir": str(folder / "store")},
        }
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.soak", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--out", type=command_line.file_to_write, help="file for the same JSON, as it grows")
    add("--plot", type=command_line.file_to_write, help="PNG of what was held over time")
    add("--jobs", type=command_line.whole(30, 10_000_000), default=2000)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; exit 1 if anything grew, or a job ended as it should not."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


def _run(options: argparse.Namespace) -> int:
    known = {
        "command": command_line.command_of("loadtest.soak"),
        "machine": machine(),
        "jobs": options.jobs,
    }
    with (
        Results(known, options.out, options.json) as results,
        stdout_is_for_json(),
        stoppable(),
        tempfile.TemporaryDirectory(prefix="kelvin-soak-") as folder,
        local_kelvin(settings(Path(folder))) as kelvin,
    ):
        soak = Soak(kelvin.url, kelvin.settings, options.jobs)
        left = asyncio.run(soak.run())
        results.keep(ended=soak.ended, wrong=soak.wrong[:20], left_after_the_last_sweep=left)
        results.keep(**report_of(soak.samples, soak.wrong, left))
        STDERR.print(table_of(results.report))
        if options.plot is not None:
            draw_soak(soak.samples).save(options.plot)
    return 0 if results.report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
