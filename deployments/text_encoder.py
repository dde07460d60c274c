"""The text stage: prompts in, embeddings out, cached by content.

Prompts that wait together are encoded together on a GPU. On a CPU each is encoded alone: a batch
gains nothing there, and the bytes of an embedding must not depend on who else was waiting.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from cluster.pool_state import ReplicaState
from deployments.embedding_cache import EmbeddingCache
from deployments.payloads import PromptEmbedding, Stamp, TextJob
from deployments.replica import Identity, ReplicaStatus, half_the_cores, prepare_torch
from deployments.replica_load import CallMeter, Statistics, replica_state, shown_load
from deployments.turns import Turns
from serve.config import ModelSettings, PoolSettings, StorageSettings
from serve.lora_settings import LoraSettings
from serve.loras import LoraLibrary
from serve.metrics import Metrics
from serve.model_dir import resolve_model_dir

_LARGEST_BATCH_ON_GPU = 8
_CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class _Waiting:
    job: TextJob
    arrived: float
    answer: asyncio.Future[PromptEmbedding]


class TextEncoder:
    """Ray Serve deployment of the three encoders; only the builder makes it one."""

    def __init__(
        self,
        model: ModelSettings,
        pool: PoolSettings,
        lora: LoraSettings | None = None,
        storage: StorageSettings | None = None,
    ) -> None:
        from deployments.sd3.text import TextEncoders

        self._identity = Identity.of_this_process("text", pool)
        self._device = prepare_torch(pool, half_the_cores())
        self._encoders = TextEncoders.load(resolve_model_dir(model), self._device, pool.precision)
        library = LoraLibrary(model, lora or LoraSettings(), storage, only_text=True)
        self._encoders.take_loras(lambda name: library.file(name)[0])
        self._largest_batch = 1 if self._device.type == "cpu" else _LARGEST_BATCH_ON_GPU
        self._cache = EmbeddingCache(_CACHE_BYTES)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._queue: deque[_Waiting] = deque()
        self._under_way: dict[TextJob, asyncio.Future[PromptEmbedding]] = {}
        self._metrics = Metrics()
        self._meter = CallMeter()
        self._turns = Turns()
        self._statistics = Statistics(self._state)
        self._worker: asyncio.Task[None] | None = None

    async def encode(
        self, jobs: tuple[TextJob, ...], alone: bool = False, traceparent: str | None = None
    ) -> tuple[PromptEmbedding, ...]:
        """Encode prompts; equal ones, in the cache or under way, are computed once.

        Args:
            jobs: The prompts.
            alone: With no other call in this replica: one died while it worked on these.
            traceparent: Of the span that this is done for; None: not traced.
        """
        with self._identity.span("text", traceparent, {"kelvin.prompts": len(jobs)}) as span:
            async with self._turns.turn(alone=alone):
                embeddings = await asyncio.gather(*(self._encode(job) for job in jobs))
            stamps = [embedding.stamp for embedding in embeddings]
            span.set_attribute(
                "kelvin.queue_s", max((each.queue_s for each in stamps), default=0.0)
            )
        load = self._state()
        return tuple(replace(embedding, load=load) for embedding in embeddings)

    async def _encode(self, job: TextJob) -> PromptEmbedding:
        arrived = time.monotonic()
        cached = self._cache.get(job)
        self._metrics.cache_lookup(hit=cached is not None)
        if cached is not None:
            return replace(cached, stamp=replace(cached.stamp, queue_s=0.0, seconds=0.0))
        answer = self._under_way.get(job)
        if answer is None:
            answer = asyncio.get_running_loop().create_future()
            self._under_way[job] = answer
            self._meter.came()
            self._queue.append(_Waiting(job, arrived, answer))
            self._metrics.queue_length("text", len(self._queue))
            if self._worker is None or self._worker.done():
                self._worker = asyncio.create_task(self._work())
        # Shielded: one caller who gives up must not take the answer from the others.
        return await asyncio.shield(answer)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            count = min(self._largest_batch, len(self._queue))
            batch = [self._queue.popleft() for _ in range(count)]
            self._meter.began(count)
            self._metrics.queue_length("text", len(self._queue))
            try:
                embeddings = await loop.run_in_executor(self._thread, self._compute, batch)
            except Exception as error:
                if len(batch) > 1:
                    await self._one_by_one(batch)
                else:
                    self._fail(batch[0], error)
                continue
            for waiting, embedding in zip(batch, embeddings, strict=True):
                self._finish(waiting, embedding)

    async def _one_by_one(self, batch: list[_Waiting]) -> None:
        """Find out which prompt of a failed batch is to blame, so that the others succeed."""
        loop = asyncio.get_running_loop()
        for waiting in batch:
            try:
                (embedding,) = await loop.run_in_executor(self._thread, self._compute, [waiting])
            except Exception as error:
                self._fail(waiting, error)
            else:
                self._finish(waiting, embedding)

    def _compute(self, batch: list[_Waiting]) -> list[PromptEmbedding]:
        started = time.monotonic()
        encoded = self._encoders.encode([waiting.job for waiting in batch])
        seconds = time.monotonic() - started
        self._metrics.stage_seconds("text", seconds)
        self._meter.took(seconds / len(batch))
        for waiting in batch:
            self._metrics.queue_seconds("text", started - waiting.arrived)
        return [
            PromptEmbedding(
                prompt_embeds=prompt.prompt_embeds,
                pooled_prompt_embeds=prompt.pooled_prompt_embeds,
                warnings=tuple(prompt.warnings),
                tokens=prompt.tokens,
                stamp=Stamp(
                    replica=self._identity.replica,
                    pid=self._identity.pid,
                    precision=self._encoders.precision.label,
                    queue_s=started - waiting.arrived,
                    seconds=seconds,
                ),
            )
            for waiting, prompt in zip(batch, encoded, strict=True)
        ]

    def _finish(self, waiting: _Waiting, embedding: PromptEmbedding) -> None:
        self._meter.ended()
        self._cache.put(waiting.job, embedding)
        del self._under_way[waiting.job]
        waiting.answer.set_result(embedding)

    def _fail(self, waiting: _Waiting, error: Exception) -> None:
        self._meter.ended()
        del self._under_way[waiting.job]
        waiting.answer.set_exception(error)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Answer Ray Serve's question for this replica's load; never fails."""
        return self._statistics.numbers()

    def check_health(self) -> None:
        """Set the gauges even where nobody asks for anything: Ray forgets them in 20 seconds."""
        self._statistics.numbers()

    def _state(self) -> ReplicaState:
        self._metrics.queue_length("text", len(self._queue))
        return replica_state(self._identity.replica, self._meter.load())

    def status(self) -> dict[str, Any]:
        """Return this replica's line of `/v1/status`."""
        return ReplicaStatus(
            **vars(self._identity),
            device=str(self._device),
            precision=self._encoders.precision.label,
            precision_reason=self._encoders.precision.reason,
            resident_bytes=self._encoders.resident_bytes,
            queue_length=len(self._under_way),
            cache_hits=self._cache.hits,
            cache_misses=self._cache.misses,
            load=shown_load(self._state()),
        ).as_json()
