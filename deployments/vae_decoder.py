"""The decode stage: latents in, pixels out, one picture at a time."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from deployments.payloads import Latents, Pixels, Stamp
from deployments.replica import Identity, ReplicaStatus, prepare_torch
from serve.config import ModelSettings, PoolSettings
from serve.metrics import Metrics
from serve.model_dir import resolve_model_dir


class VaeDecoder:
    """Ray Serve deployment of one VAE; only the builder makes it one."""

    def __init__(self, model: ModelSettings, pool: PoolSettings) -> None:
        from deployments.sd3.vae import VaeDecoder as Decoder

        self._identity = Identity.of_this_process("decode", pool)
        self._device = prepare_torch(pool)
        self._decoder = Decoder.load(resolve_model_dir(model), self._device, pool.precision)
        # One thread: torch already uses every core for one picture.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._unfinished = 0
        self._metrics = Metrics()

    async def decode(self, latents: Latents) -> Pixels:
        """Decode one picture off the event loop."""
        arrived = time.monotonic()
        self._count(1)
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, self._decode, latents, arrived
            )
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self._unfinished += change
        self._metrics.queue_length("decode", self._unfinished)

    def _decode(self, latents: Latents, arrived: float) -> Pixels:
        started = time.monotonic()
        pixels = self._decoder.decode(latents.latents)
        seconds = time.monotonic() - started
        self._metrics.stage_seconds("decode", seconds)
        stamp = Stamp(
            replica=self._identity.replica,
            pid=self._identity.pid,
            precision=self._decoder.precision.label,
            queue_s=started - arrived,
            seconds=seconds,
        )
        return Pixels(pixels=pixels, stamp=stamp)

    def status(self) -> dict[str, Any]:
        """Return this replica's line of `/v1/status`."""
        return ReplicaStatus(
            **vars(self._identity),
            device=str(self._device),
            precision=self._decoder.precision.label,
            precision_reason=self._decoder.precision.reason,
            resident_bytes=self._decoder.resident_bytes,
            queue_length=self._unfinished,
            cache_hits=0,
            cache_misses=0,
        ).as_json()
