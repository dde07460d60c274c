"""The decode stage: latents in, pixels out, one picture at a time.

It encodes start images too: both halves of a VAE are small beside what either computes with.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from cluster.pool_state import ReplicaState
from deployments.forward_report import LATENT_PIXELS, report_decoding
from deployments.payloads import EncodedImage, Latents, Pixels, Stamp
from deployments.replica import Identity, ReplicaStatus, half_the_cores, prepare_torch
from deployments.replica_load import CallMeter, Statistics, replica_state, shown_load
from deployments.turns import Turns
from serve.config import ModelSettings, PoolSettings
from serve.metrics import Metrics
from serve.model_dir import resolve_model_dir
from serve.models import ModelSpec

_Payload = TypeVar("_Payload")
_Answer = TypeVar("_Answer")


class VaeDecoder:
    """Ray Serve deployment of one VAE; only the builder makes it one."""

    def __init__(self, model: ModelSettings, pool: PoolSettings) -> None:
        from deployments.sd3.decode_plan import GIB, TilingSettings
        from deployments.sd3.vae import VaeDecoder as Decoder

        self._identity = Identity.of_this_process("decode", pool)
        self._device = prepare_torch(pool, half_the_cores())
        tiling = TilingSettings(pool.decode_tiling, int(pool.decode_memory_gib * GIB))
        model_dir = resolve_model_dir(model)
        self._decoder = Decoder.load(model_dir, self._device, pool.precision, tiling)
        if pool.decode_compile == "auto":
            defaults = ModelSpec.from_directory(model_dir).defaults
            for width, height in pool.warm_sizes or ((defaults.width, defaults.height),):
                self._decoder.prepare(height // LATENT_PIXELS, width // LATENT_PIXELS)
        # One thread: torch already uses every core for one picture.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._metrics = Metrics()
        self._meter = CallMeter()
        self._turns = Turns()
        self._statistics = Statistics(self._state)

    async def decode(
        self, latents: Latents, alone: bool = False, traceparent: str | None = None
    ) -> Pixels:
        """Decode one picture off the event loop; alone, if a replica died while it did that."""
        with self._identity.span("decode", traceparent) as span:
            async with self._turns.turn(alone=alone):
                decoded = await self._done(self._decode, latents)
            span.set_attribute("kelvin.queue_s", decoded.stamp.queue_s)
        return replace(decoded, load=self._state())

    async def encode(
        self, pixels: NDArray[np.uint8], alone: bool = False, traceparent: str | None = None
    ) -> EncodedImage:
        """Encode one start image, uint8 [height, width, 3] RGB, likewise."""
        with self._identity.span("encode", traceparent) as span:
            async with self._turns.turn(alone=alone):
                encoded = await self._done(self._encode, pixels)
            span.set_attribute("kelvin.queue_s", encoded.stamp.queue_s)
        return replace(encoded, load=self._state())

    async def _done(self, do: Callable[[_Payload, float], _Answer], payload: _Payload) -> _Answer:
        self._meter.came()
        self._tell_queue()
        work = self._thread.submit(do, payload, time.monotonic())
        try:
            return await asyncio.wrap_future(work)
        except asyncio.CancelledError:
            if work.cancel():
                self._meter.left()
            raise
        finally:
            self._tell_queue()

    def _tell_queue(self) -> None:
        self._metrics.queue_length("decode", self._meter.load().requests)

    def _decode(self, latents: Latents, arrived: float) -> Pixels:
        with self._stamped("decode", arrived) as stamp:
            pixels = self._decoder.decode(latents.latents)
        return Pixels(pixels=pixels, stamp=stamp())

    def _encode(self, pixels: NDArray[np.uint8], arrived: float) -> EncodedImage:
        with self._stamped("encode", arrived) as stamp:
            mean, std = self._decoder.encode(pixels)
        return EncodedImage(mean=mean, std=std, stamp=stamp())

    @contextmanager
    def _stamped(
        self, work: Literal["encode", "decode"], arrived: float
    ) -> Iterator[Callable[[], Stamp]]:
        """Meter a block; what it yields tells afterwards of who did it and how long it took."""
        started = time.monotonic()
        self._meter.began()
        try:
            yield lambda: stamp
        finally:
            self._meter.ended()
        seconds = time.monotonic() - started
        self._meter.took(seconds)
        self._metrics.stage_seconds(work, seconds)
        self._metrics.queue_seconds(work, started - arrived)
        stamp = Stamp(
            replica=self._identity.replica,
            pid=self._identity.pid,
            precision=self._decoder.precision.label,
            queue_s=started - arrived,
            seconds=seconds,
        )

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Answer Ray Serve's question for this replica's load; never fails."""
        return self._statistics.numbers()

    def check_health(self) -> None:
        """Set the gauges even where nobody asks for anything: Ray forgets them in 20 seconds."""
        self._statistics.numbers()

    def _state(self) -> ReplicaState:
        self._tell_queue()
        return replica_state(self._identity.replica, self._meter.load())

    def status(self) -> dict[str, Any]:
        """Return this replica's line of `/v1/status`."""
        return ReplicaStatus(
            **vars(self._identity),
            device=str(self._device),
            precision=self._decoder.precision.label,
            precision_reason=self._decoder.precision.reason,
            resident_bytes=self._decoder.resident_bytes,
            queue_length=self._meter.load().requests,
            cache_hits=0,
            cache_misses=0,
            load=shown_load(self._state()),
            **report_decoding(self._decoder.prepared),
        ).as_json()
