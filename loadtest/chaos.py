"""Jobs under constant load while something random is killed: each must end once, as undisturbed.

`python -m loadtest.chaos --jobs 300 --json` starts Kelvin with pico on this machine, on a store of
its own, keeps some jobs under way and kills, with SIGKILL and in random order, replicas of every
stage, Pipelines, Serve's controller and its proxy; and takes the store away for seconds. Then it
compares every job with an undisturbed run, and the journal with what clients were told.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from loadtest.chaos_victims import KINDS, Kind, kill_one
from loadtest.overhead import machine
from loadtest.results import STDERR
from loadtest.trace_plot import Panel, draw_trace
from serve.commands.output import stdout_is_for_json, write_json
from serve.commands.stopping import stoppable
from serve.config import Settings, StorageSettings, load_settings
from serve.embedded_store import EmbeddedStore
from serve.jobs import JobJournal
from serve.local import LocalKelvin
from serve.storage import ObjectStore

_VARIANTS = 6
_STEPS = 40
_STORE_AWAY_S = (2.0, 6.0)
_LONGEST_S = 300.0
_POLL_S = 0.25


@dataclass
class Run:
    """What happens in one run; all of it on one event loop.

    Attributes:
        kelvin: Under attack.
        store: It can be taken away.
        session: Folder of the Ray that runs it.
    """

    kelvin: LocalKelvin
    store: EmbeddedStore
    session: str
    draw: random.Random
    accepted: dict[str, int] = field(default_factory=dict)  # job id -> its variant
    ended: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: int = 0
    strikes: list[tuple[float, Kind]] = field(default_factory=list)
    not_found: list[Kind] = field(default_factory=list)  # to be struck, but not there just then
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def now(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    async def work(self, number: int, at_once: int, every_s: float) -> None:
        """Send jobs, so many under way at a time, and strike until all have ended."""
        loads = [
            asyncio.create_task(self._client(worker, number, at_once)) for worker in range(at_once)
        ]
        side = [asyncio.create_task(self._strike(every_s)), asyncio.create_task(self._sample())]
        try:
            await asyncio.wait_for(asyncio.gather(*loads), _LONGEST_S + number)
        finally:
            for task in side:
                task.cancel()
            await asyncio.gather(*side, return_exceptions=True)

    async def _client(self, worker: int, number: int, at_once: int) -> None:
        async with httpx.AsyncClient(base_url=self.kelvin.url, trust_env=False, timeout=20) as http:
            for index in range(worker, number, at_once):
                job_id = await self._submitted(http, index)
                self.accepted[job_id] = index % _VARIANTS
                self.ended[job_id] = await self._end(http, job_id)

    async def _submitted(self, http: httpx.AsyncClient, index: int) -> str:
        """Submit until accepted; the key makes one job of all tries."""
        while True:
            try:
                answer = await http.post(
                    "/v1/jobs",
                    json=request(index % _VARIANTS),
                    headers={"Idempotency-Key": f"chaos-{index}"},
                )
                if answer.status_code in (200, 202):
                    return str(answer.json()["id"])
                self.refused += 1
            except httpx.TransportError:
                self.refused += 1
            await asyncio.sleep(_POLL_S)

    async def _end(self, http: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
        while True:
            try:
                answer = await http.get(f"/v1/jobs/{job_id}")
                if answer.status_code == 200:
                    record: dict[str, Any] = answer.json()
                    if record["status"] in ("succeeded", "failed", "cancelled"):
                        return record
            except httpx.TransportError:
                self.refused += 1
            await asyncio.sleep(_POLL_S)

    async def _strike(self, every_s: float) -> None:
        kinds: list[Kind] = []
        while True:
            await asyncio.sleep(self.draw.uniform(0.5, 1.5) * every_s)
            if not kinds:
                kinds = list(KINDS)
                self.draw.shuffle(kinds)
            kind = kinds.pop()
            at = self.now
            if kind == "store":
                self.strikes.append((at, kind))
                await asyncio.to_thread(self.store.stop)
                try:
                    await asyncio.sleep(self.draw.uniform(*_STORE_AWAY_S))
                finally:
                    await asyncio.to_thread(self.store.start)
            elif await asyncio.to_thread(kill_one, kind, self.session, self.draw) is None:
                self.not_found.append(kind)
            else:
                self.strikes.append((at, kind))

    async def _sample(self) -> None:
        while True:
            self.samples.append((self.now, len(self.accepted), len(self.ended)))
            await asyncio.sleep(_POLL_S)


def request(variant: int) -> dict[str, Any]:
    """Return one of a few requests, each of which always makes the same picture."""
    return {"prompt": f"picture {variant}", "num_inference_steps": _STEPS, "seed": variant}


def pixels_of(image: dict[str, Any]) -> NDArray[np.uint8] | None:
    """Return a stored picture; None: it is not there, or not what its result says."""
    answer = httpx.get(image["url"], trust_env=False)
    if answer.status_code != 200 or hashlib.sha256(answer.content).hexdigest() != image["sha256"]:
        return None
    with Image.open(io.BytesIO(answer.content)) as picture:
        return np.asarray(picture.convert("RGB"))


def verdict(run: Run, number: int, undisturbed: list[NDArray[np.uint8]]) -> dict[str, Any]:
    """Return what is wrong, which is nothing, and the numbers of the run."""
    missing, different, failed = [], [], []
    for job_id, record in run.ended.items():
        if record["status"] != "succeeded":
            failed.append({"id": job_id, "status": record["status"], "error": record["error"]})
            continue
        pixels = pixels_of(record["result"]["images"][0])
        if pixels is None:
            missing.append(job_id)
            continue
        off = np.abs(pixels.astype(int) - undisturbed[run.accepted[job_id]])
        # DESIGN.md, "the same picture", Pixels: at most 1/255 off on 99.9 % of pixels.
        if float((off.max(axis=-1) <= 1).mean()) < 0.999:
            different.append(job_id)
    journal = JobJournal(ObjectStore(run.kelvin.settings.storage))
    pending = asyncio.run(journal.pending())
    kills = {kind: sum(struck == kind for _, struck in run.strikes) for kind in KINDS}
    return {
        "jobs": number,
        "accepted": len(run.accepted),
        "succeeded": len(run.ended) - len(failed),
        "failed": failed,
        "missing_pictures": missing,
        "different_pictures": different,
        "still_pending": pending,
        "calls_refused_or_lost": run.refused,
        "struck": kills,
        "not_found": run.not_found,
        "seconds": round(run.now, 1),
        "ok": len(run.ended) == number and not (failed or missing or different or pending),
        "machine": machine(),
    }


def draw_timeline(run: Run, file: Path) -> None:
    """Draw jobs accepted and ended over time, with each strike."""
    seconds = [at for at, _, _ in run.samples]
    panels = [
        Panel(
            "jobs",
            {
                "accepted": [float(accepted) for _, accepted, _ in run.samples],
                "ended": [float(ended) for _, _, ended in run.samples],
            },
        ),
        Panel("jobs under way", {"": [float(begun - done) for _, begun, done in run.samples]}),
    ]
    draw_trace(seconds, panels, [(0.0, ""), *run.strikes]).save(file)


@contextmanager
def attacked_kelvin(folder: Path, seed: int) -> Iterator[Run]:
    """Yield a running Kelvin with two of everything, and how to hurt it."""
    store = EmbeddedStore(folder / "store", "chaos")
    store.start()
    try:
        with LocalKelvin(_settings(store, folder)) as kelvin:
            from ray._private.worker import _global_node

            if _global_node is None:
                raise RuntimeError("Ray runs elsewhere: what is not ours is not killed")
            session = str(_global_node.get_session_dir_path())
            yield Run(kelvin, store, session, random.Random(seed))
    finally:
        store.stop()


def _settings(store: EmbeddedStore, folder: Path) -> Settings:
    def pool(name: str) -> list[dict[str, Any]]:
        return [{"name": name, "num_replicas": 2, "torch_threads": 1}]

    return load_settings(
        overrides={
            "model": {"path": "pico"},
            "text_encoder": pool("text-encoder"),
            "denoiser": pool("denoiser"),
            "vae_decoder": pool("vae-decoder"),
            "pipeline": {"num_replicas": 2},
            "http": {"port": 0},
            "storage": store.storage_settings(StorageSettings()).model_dump(),
            "embedded_store": {"enabled": False},
            "journal": {"lease_s": 6.0},
            "spool": {"directory": str(folder / "spool")},
        }
    )


def chaos(
    number: int, *, at_once: int, every_s: float, seed: int, plot: Path | None
) -> dict[str, Any]:
    """Run it and return the verdict.

    Args:
        number: Of jobs.
        at_once: Of them under way.
        every_s: Between two strikes, about.
        seed: Of what is struck when.
        plot: Where the timeline is drawn, if anywhere.
    """
    with (
        tempfile.TemporaryDirectory(prefix="kelvin-chaos-") as folder,
        attacked_kelvin(Path(folder), seed) as run,
    ):
        undisturbed = undisturbed_pictures(run.kelvin.url)
        run.began = time.monotonic()
        asyncio.run(run.work(number, at_once, every_s))
        found = verdict(run, number, undisturbed)
        if plot is not None:
            draw_timeline(run, plot)
    return found


def undisturbed_pictures(url: str) -> list[NDArray[np.uint8]]:
    """Return what each of the requests makes while nothing is struck."""
    return [_undisturbed(url, variant) for variant in range(_VARIANTS)]


def _undisturbed(url: str, variant: int) -> NDArray[np.uint8]:
    answer = httpx.post(f"{url}/v1/generate", json=request(variant), trust_env=False, timeout=60)
    pixels = pixels_of(answer.raise_for_status().json()["images"][0])
    if pixels is None:
        raise RuntimeError("a picture of the undisturbed run is missing")
    return pixels


def main() -> int:
    """Run chaos; exit 1 if anything was lost, doubled or changed."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m loadtest.chaos")
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--at-once", type=int, default=8, help="jobs under way at a time")
    parser.add_argument("--every-s", type=float, default=8.0, help="between two strikes, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="PNG of the timeline")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    if options.jobs < 1 or options.at_once < 1 or not options.every_s > 0:
        parser.error("--jobs, --at-once and --every-s are above 0")
    with stdout_is_for_json() as stdout, stoppable():
        found = chaos(
            options.jobs,
            at_once=options.at_once,
            every_s=options.every_s,
            seed=options.seed,
            plot=options.plot,
        )
        STDERR.print_json(data=found)
        if options.json:
            write_json(found, stdout)
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
