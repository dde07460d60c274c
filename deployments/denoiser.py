"""The denoise stage: one call per picture, its progress streamed, its latents the last item.

A replica that is asked to go ends all its streams at the next step, with what another one needs.

The engine computes in a thread of its own and decides what shares a forward; this class carries
its events onto the event loop and away.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from cluster.pool_state import ReplicaState
from cluster.work_keys import lora_key
from deployments.forward_record import Forward
from deployments.forward_report import report_forwards
from deployments.payloads import DenoiseEvent, DenoiseJob, Handover, Latents, StepProgress
from deployments.replica import Identity, ReplicaStatus, cores_to_denoise, prepare_torch
from deployments.replica_load import Statistics, replica_state, shown_load
from deployments.replica_stop import stop_signal
from deployments.turns import Turns
from serve import telemetry
from serve.config import ModelSettings, PoolSettings, StorageSettings, ThermalSettings
from serve.heat_settings import GovernorSection
from serve.lora_settings import LoraSettings
from serve.loras import LoraLibrary
from serve.metrics import Metrics
from serve.model_dir import resolve_model_dir
from serve.models import ModelSpec

# Each item of the stream costs a message between processes. Steps that follow one another faster
# than this travel together; nobody sees a progress bar move more often.
_BETWEEN_ITEMS_S = 0.05


class Denoiser:
    """Ray Serve deployment of one engine; only the builder makes it one."""

    def __init__(
        self,
        model: ModelSettings,
        pool: PoolSettings,
        thermal: ThermalSettings | None = None,
        governor: GovernorSection | None = None,
        lora: LoraSettings | None = None,
        storage: StorageSettings | None = None,
    ) -> None:
        from deployments.batch_spans import BatchSpans
        from deployments.brief_thread import in_brief_thread
        from deployments.card_heat import CardHeat
        from deployments.energy import EnergyMeter
        from deployments.engine import Engine
        from deployments.input_limits import InputLimits
        from deployments.job_size import LATENT_PIXELS
        from deployments.lora_room import lora_shelf
        from deployments.lora_shelf import LoraShelf
        from deployments.sd3.mmdit import Mmdit
        from deployments.sd3.previews import LatentRgb
        from deployments.step_costs import TokenShape
        from deployments.warm_up import text_tokens_of, warm_up

        self._identity = Identity.of_this_process("denoise", pool)
        self._device = prepare_torch(pool, cores_to_denoise(pool))
        model_dir = resolve_model_dir(model)
        defaults = ModelSpec.from_directory(model_dir).defaults
        library = LoraLibrary(model, lora or LoraSettings(), storage)

        def load() -> tuple[Mmdit, LoraShelf | None]:
            mmdit = Mmdit.load(model_dir, self._device, pool.precision)
            # Before warm-up, which prepares forwards with LoRAs and counts what memory is left.
            return mmdit, lora_shelf(mmdit, library, lora or LoraSettings())

        self._mmdit, self._loras = in_brief_thread(self._device, load)
        self._heat = CardHeat(
            self._device,
            thermal or ThermalSettings(source="off"),
            governor or GovernorSection(),
            pool.name,
        )
        model_at_hand = self._heat.rehearsed(self._mmdit)
        text_tokens = text_tokens_of(model_dir, defaults.max_sequence_length)
        warmed = in_brief_thread(
            self._device,
            lambda: warm_up(
                model_at_hand,
                pool.warm_sizes or ((defaults.width, defaults.height),),
                text_tokens,
                pool.warm_rows,
            ),
        )
        meter = EnergyMeter(self._device)
        self._batches = BatchSpans(self._identity)
        self._metrics = Metrics()
        self._engine = Engine(
            model_at_hand,
            max_waiting=pool.max_ongoing_requests,
            limits=InputLimits(
                joint_attention_dim=self._mmdit.joint_attention_dim,
                pooled_projection_dim=self._mmdit.pooled_projection_dim,
                largest_side=self._mmdit.largest_side,
                latent_channels=self._mmdit.in_channels,
            ),
            costs=warmed.costs,
            memory=warmed.memory,
            prepared_rows=warmed.prepared_rows,
            meter=meter if meter.is_available else None,
            governor=self._heat.governor,
            usual=TokenShape(
                defaults.height // LATENT_PIXELS, defaults.width // LATENT_PIXELS, text_tokens
            ),
            latent_rgb=LatentRgb.of_model(model_dir),
            loras=self._loras,
            checkpoint_every=pool.checkpoint_every_steps,
            on_forward=self._ran,
            leaving=stop_signal() if pool.checkpoint_every_steps else None,
        )
        self._turns = Turns()
        self._statistics = Statistics(self._state)

    async def denoise(self, job: DenoiseJob) -> AsyncIterator[tuple[DenoiseEvent, ...]]:
        """Yield what happened since the last item; an empty item once a job that asks is alone.

        The last event of the last item is Latents, or a Handover where this replica goes.

        Raises:
            KelvinError: As the engine says; others are its bugs.
        """
        if job.loras and self._loras is not None:
            await asyncio.to_thread(self._loras.check, job.loras)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[DenoiseEvent | BaseException] = asyncio.Queue()

        def from_engine(event: DenoiseEvent | BaseException) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        with self._batches.of(job) as span:
            traced = replace(job, traceparent=telemetry.traceparent_of(span))
            async with self._turns.turn(alone=job.alone):
                if job.alone:
                    yield ()  # from now on it is alone
                ticket = self._engine.submit(traced, from_engine)
                self._metrics.queue_length("denoise", self._engine.queue_length)
                try:
                    async for together in _grouped(events):
                        newest = _with_newest_checkpoint(together)
                        stamped = [self._stamped(job, event) for event in newest]
                        if isinstance(stamped[-1], Latents):
                            stamp = stamped[-1].stamp
                            span.set_attribute("kelvin.queue_s", stamp.queue_s)
                            span.set_attribute("kelvin.precision", stamp.precision)
                        yield self._with_load(stamped)
                finally:
                    # Cancelled, disconnected or finished: an engine that is done takes no notice.
                    ticket.cancel()

    def _ran(self, forward: Forward) -> None:
        self._metrics.step(forward.seconds, forward.rows, forward.path)
        self._batches.ran(forward)

    def _stamped(self, job: DenoiseJob, event: DenoiseEvent) -> DenoiseEvent:
        if not isinstance(event, Latents):
            return event
        self._metrics.stage_seconds("denoise", event.stamp.seconds)
        self._metrics.queue_seconds("denoise", event.stamp.queue_s)
        self._metrics.queue_length("denoise", self._engine.queue_length)
        stamp = replace(
            event.stamp,
            replica=self._identity.replica,
            pid=self._identity.pid,
            precision=self._mmdit.precision.label,
        )
        return replace(event, stamp=stamp, cool_s=self._engine.cool_seconds(job))

    def _with_load(self, events: list[DenoiseEvent]) -> tuple[DenoiseEvent, ...]:
        """Let each item of the stream carry this replica's load once; of who goes nobody asks."""
        if isinstance(events[-1], Handover):
            return tuple(events)
        return *events[:-1], replace(events[-1], load=self._state())

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Answer Ray Serve's question for this replica's load; never fails."""
        return self._statistics.numbers()

    def _state(self) -> ReplicaState:
        reading = self._heat.reading
        state = replica_state(
            self._identity.replica, self._engine.load(), reading, self._heat.age_s
        )
        if self._loras is not None:
            held = {lora_key(name) for name in self._loras.held()}
            state = replace(state, holds=state.holds | held)
        self._metrics.heat(state, reading)
        self._metrics.queue_length("denoise", self._engine.queue_length)
        return state

    def check_health(self) -> None:
        """Tell Serve to replace this replica once its engine or its GPU is gone or stuck.

        Raises:
            StageUnavailable: The engine takes no more work; says why.
        """
        self._statistics.numbers()  # sets the gauges even where nobody else asks
        self._engine.check_health()

    def status(self) -> dict[str, Any]:
        """Return this replica's line of `/v1/status`."""
        replica = ReplicaStatus(
            **vars(self._identity),
            device=str(self._device),
            precision=self._mmdit.precision.label,
            precision_reason=self._mmdit.precision.reason,
            resident_bytes=self._mmdit.resident_bytes,
            queue_length=self._engine.queue_length,
            cache_hits=0,
            cache_misses=0,
            load=shown_load(self._state()),
            heat=self._heat.shown(self._engine.allowance),
            **report_forwards(self._engine.measured(), self._mmdit),
        )
        held = {"held": self._loras.held(), "ranks": self._loras.ranks} if self._loras else None
        return {**replica.as_json(), "engine": self._engine.stats().as_json(), "loras": held}


def _with_newest_checkpoint(events: list[DenoiseEvent]) -> list[DenoiseEvent]:
    """Leave out all checkpoints but the last: nobody goes on from the others any more."""
    kept: list[DenoiseEvent] = []
    # What ends the stream needs none, or brings its own.
    is_needed = isinstance(events[-1], StepProgress)
    for event in reversed(events):
        if isinstance(event, StepProgress) and event.checkpoint is not None:
            kept.append(event if is_needed else replace(event, checkpoint=None))
            is_needed = False
        else:
            kept.append(event)
    return kept[::-1]


async def _grouped(
    events: asyncio.Queue[DenoiseEvent | BaseException],
) -> AsyncIterator[list[DenoiseEvent]]:
    """Yield events in order, those close in time together, up to and with the one that ends all."""
    sent_at = -_BETWEEN_ITEMS_S
    while True:
        together = [_raised(await events.get())]
        while isinstance(together[-1], StepProgress):
            remaining = sent_at + _BETWEEN_ITEMS_S - time.monotonic()
            try:
                if remaining > 0:
                    event = await asyncio.wait_for(events.get(), remaining)
                else:
                    event = events.get_nowait()
            except (TimeoutError, asyncio.QueueEmpty):
                break
            together.append(_raised(event))
        yield together
        if not isinstance(together[-1], StepProgress):
            return
        sent_at = time.monotonic()


def _raised(event: DenoiseEvent | BaseException) -> DenoiseEvent:
    if isinstance(event, BaseException):
        raise event
    return event
