"""The denoising loop: step-level continuous batching, in a thread of its own.

Each turn drops what was cancelled or is late, admits what memory allows, lets the policy choose
rows of one token shape, runs one forward over them, steps every request's own sampler and lets the
finished out. Requests that share a forward may differ in everything but the token shape.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from cluster.governor import FREE, IDLE, Allowance
from deployments.device_errors import first_line, is_sticky
from deployments.energy_shares import EnergyShares, Meter
from deployments.engine_load import EngineLoad, LoadMeter
from deployments.forward import Stepped, step_together
from deployments.forward_record import EngineStats, Forward, ForwardRecord, Member
from deployments.forward_watch import ForwardWatch
from deployments.input_limits import InputLimits
from deployments.live_request import LiveRequest, VelocityModel
from deployments.live_set import LiveSet
from deployments.lora_admission import LoraAdmission
from deployments.lora_shelf import LoraShelf
from deployments.memory_budget import MemoryBudget, ModelMemory
from deployments.payloads import DenoiseEvent, DenoiseJob, Handover, Latents, Path
from deployments.recovery import Recovery, caught, told
from deployments.schedule import TokenShape, Work, choose
from deployments.sd3.previews import LatentRgb, Previewer
from deployments.sd3.sampler_checkpoint import check_fits
from deployments.step_costs import StepCosts
from deployments.ticket import Clock, OnEvent, Ticket
from serve.errors import KelvinError, StageUnavailable

Policy = Callable[[Sequence[Work], StepCosts, float, Callable[[TokenShape], int]], tuple[int, ...]]

# Between two looks at a card's free memory while nothing waits for it.
_LOOK_AGAIN_S = 1.0
# Of a pause for heat, before it is seen who was cancelled and whether the card has cooled.
_REST_AT_ONCE_S = 0.25
# Between two looks at whether a LoRA has come, where nobody says so and nothing else is to be done.
_LOOK_FOR_LORA_S = 0.05

_log = logging.getLogger(__name__)


class Engine:
    """Denoises submitted jobs in a thread of its own.

    Args:
        model: Predicts velocities; used from the engine's thread only.
        max_waiting: Requests that may wait for their first step; more are refused.
        limits: Shapes that the model takes.
        costs: What forwards take; the engine goes on measuring into it.
        memory: What there is room for; the device's own if None.
        prepared_rows: The most rows of a shape that were made fast at start-up; its forwards take
            no more. Other shapes have the memory's limit only.
        meter: Of the card's energy.
        governor: Says before each forward what the card may do; free if None.
        usual: Shape of the model's usual pictures, by which cards are compared.
        latent_rgb: Map of the model's VAE, for previews; SD3.5's if None.
        loras: Of the model; None: it takes none.
        checkpoint_every: Steps between two checkpoints of a request; 0: none.
        on_forward: Called from the engine's thread after each forward that went well, before its
            requests are told; it must neither block nor raise.
        leaving: Says at each turn whether to hand back all work instead; never if None.
        policy: Chooses whose rows go into the next forward.
        clock: Of all times, in seconds.

    Raises:
        ConfigurationError: `latent_rgb` is for another number of channels.
    """

    def __init__(
        self,
        model: VelocityModel,
        *,
        max_waiting: int,
        limits: InputLimits | None = None,
        costs: StepCosts | None = None,
        memory: MemoryBudget | None = None,
        prepared_rows: Mapping[TokenShape, int] | None = None,
        meter: Meter | None = None,
        governor: Callable[[], Allowance] | None = None,
        usual: TokenShape | None = None,
        latent_rgb: LatentRgb | None = None,
        loras: LoraShelf | None = None,
        checkpoint_every: int = 0,
        on_forward: Callable[[Forward], None] | None = None,
        leaving: Callable[[], bool] | None = None,
        policy: Policy = choose,
        clock: Clock = time.monotonic,
    ) -> None:
        self.model = model
        self.costs = costs or StepCosts()
        self._limits = limits or InputLimits()
        self._memory = memory or MemoryBudget.of_device(model.device)
        self._model_memory = ModelMemory(model.in_channels, model.precision.compute_dtype)
        self._energy = EnergyShares(meter)
        self._prepared_rows = dict(prepared_rows or {})
        self._governor = governor or (lambda: FREE)
        self._checkpoint_every = checkpoint_every
        self._on_forward = on_forward or (lambda forward: None)
        self._leaving = leaving or (lambda: False)
        self._allowance = FREE
        self._last_forward_s = 0.0
        self._load = LoadMeter(self.costs, clock, usual)
        self._previewer = Previewer(latent_rgb, model.in_channels)
        self._policy = policy
        self._clock = clock
        self._requests = LiveSet(model, self._memory, max_waiting, clock)
        self._loras = LoraAdmission(loras, self._requests.wake)
        self._watch = ForwardWatch(clock)
        self._recovery = Recovery(
            model.device,
            self._memory,
            drop=self._drop,
            live=lambda: self._requests.counts[1],
            pause=self._requests.pause,
        )
        self._looked_at = float("-inf")
        self._record = ForwardRecord(self.costs)
        self._thread = threading.Thread(target=self._run, name="denoise-engine", daemon=True)
        self._thread.start()

    @property
    def queue_length(self) -> int:
        """Requests submitted and not finished, running ones included."""
        return sum(self._requests.counts)

    @property
    def is_alive(self) -> bool:
        """True while it takes work."""
        return self.ended_because is None

    @property
    def ended_because(self) -> str | None:
        """Why it takes no more work, in words; None while it does."""
        return self._requests.ended_because

    def stats(self) -> EngineStats:
        """Return what it is doing now."""
        waiting, live = self._requests.counts
        return self._record.stats(live, waiting, self._energy.total_joules)

    def load(self) -> EngineLoad:
        """Return how much there is to do, and how fast it is done."""
        return self._load.load(self._requests.tickets(), self.allowance.duty)

    def cool_seconds(self, job: DenoiseJob) -> float:
        """Return what the steps that a job still needs take alone on the cool card."""
        return self._load.cool_seconds(job)

    @property
    def allowance(self) -> Allowance:
        """What the governor last let the card do; who does nothing is not held back."""
        return self._allowance if self.queue_length else IDLE

    def measured(self) -> dict[str, Any]:
        """Return what forwards take, as `StepCosts.as_json` does."""
        return self._record.costs()

    def submit(self, job: DenoiseJob, on_event: OnEvent) -> Ticket:
        """Queue a job.

        Args:
            job: What to denoise.
            on_event: Called from the engine's thread with a StepProgress after each step, then
                once with Latents, with a Handover, or with the error that ended it. It must not
                block.

        Raises:
            InvalidRequest: A size that the model cannot draw or that can never fit in memory, or
                LoRAs that cannot be used.
            StageFailed: Embeddings of the wrong shape or dtype.
            CheckpointRefused: It cannot go on from `job.resume`.
            Overloaded: Too many requests wait already.
            StageUnavailable: The engine was closed.
        """
        self._limits.check(job)
        if job.resume is not None:
            check_fits(job.resume, job, self._model_memory.channels)
        self._memory.check(job, self._model_memory)
        self._loras.check(job.loras)
        ticket = self._requests.add(job, on_event)
        self._load.accepted(job)
        return ticket

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop after the step under way; whatever is unfinished ends with StageUnavailable."""
        self._requests.end("it is shutting down")
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def check_health(self) -> None:
        """Ask an idle card whether it is still there; a busy one is asked by every forward.

        Raises:
            StageUnavailable: The engine takes no more work, now or already, or is stuck; says why.
        """
        if (stuck := self._watch.stuck_because) is not None:
            self._requests.end(stuck)
        # Asking may wait for a forward under way.
        if self.model.device.type == "cuda" and self.is_alive and not self._watch.is_running:
            try:
                torch.cuda.mem_get_info(self.model.device)
            except RuntimeError as error:
                self._requests.end(f"the GPU does not answer: {first_line(error)}")
        if self.ended_because is not None:
            raise StageUnavailable(f"The denoising engine has ended: {self.ended_because}.")

    def _run(self) -> None:
        try:
            # A state of a thread, so it is set here and not where the model was loaded.
            with torch.inference_mode():
                # What the card used while it idled is nobody's.
                while self._requests.wait_for_work(self._energy.settle):
                    self._turn()
        except BaseException as error:
            if not (isinstance(error, Exception) and is_sticky(error)):
                self._requests.end(f"a bug of its own: {type(error).__name__}: {first_line(error)}")
                raise
            # Whose fault it was cannot be known: all are tried elsewhere, so often and no more.
            self._requests.end(f"the GPU was lost: {first_line(error)}")
            _log.error("the GPU was lost", exc_info=error)
        finally:
            gone = StageUnavailable(f"This denoiser has ended: {self.ended_because}.")
            for ticket in self._requests.tickets():
                self._drop(ticket, gone)
            self._loras.close()

    def _turn(self) -> None:
        self._drop_ended()
        if self._leaving():
            self._hand_over()
            return
        with self._watch.running(0.0):  # it copies to the card
            self._admit()
        self._allowance = self._governor()
        chosen = self._choose()
        if chosen:
            self._advance(chosen)
            self._rest()
        elif self._loras.may_hold_up:
            self._requests.pause(_LOOK_FOR_LORA_S)

    def _rest(self) -> None:
        """Pause as the governor wants it, asked again on the way; the ended go meanwhile."""
        rested = 0.0
        while self.is_alive and self.queue_length and not self._leaving():
            left = self._allowance.pause_s(self._last_forward_s) - rested
            if left <= 0:
                return
            part = min(left, _REST_AT_ONCE_S)
            self._requests.rest(part)
            rested += part
            self._drop_ended()
            self._allowance = self._governor()

    def _drop_ended(self) -> None:
        """Let go of what was cancelled or whose deadline has passed."""
        now = self._clock()
        for ticket in self._requests.tickets():
            over = ticket.over(now, self._allowance.duty)
            if over is not None:
                self._drop(ticket, over)

    def _hand_over(self) -> None:
        """End every request with what another engine needs to go on with it."""
        live = {each.ticket.key: each for each in self._requests.live}
        for ticket in self._requests.tickets():
            running = live.get(ticket.key)
            checkpoint = ticket.job.resume if running is None else running.checkpoint()
            self._drop(ticket, Handover(checkpoint))

    def _admit(self) -> None:
        waiting, live = self._requests.counts
        now = self._clock()
        if (waiting and live) or now >= self._looked_at + _LOOK_AGAIN_S:
            self._memory.look(self._requests.held_bytes)
            self._looked_at = now
        while (ticket := self._requests.next_to_admit(self._loras.may_start())) is not None:
            try:
                pages = self._loras.pages(ticket)
                admitted = LiveRequest(ticket, self.model, pages, self._checkpoint_every)
            except Exception as error:
                failure = caught(error)
            else:
                self._requests.admit(admitted)
                continue
            self._recovery.not_admitted(ticket, failure)
            return  # the live ones go on first

    def _choose(self) -> list[LiveRequest]:
        """Return whose rows go into the next forward; all of one latent and text shape."""
        live, held = self._recovery.ready(self._requests.live), self._requests.held_bytes
        most_rows = self._allowance.most_rows

        def row_limit(shape: TokenShape) -> int:
            limit = self._memory.row_limit(shape, held)
            return min(limit, self._prepared_rows.get(shape, limit), most_rows or limit)

        # With its pauses a forward takes so much longer, and deadlines are judged by that.
        costs = self.costs.stretched(1 / self._allowance.duty)
        keys = self._policy([each.work() for each in live], costs, self._clock(), row_limit)
        by_key = {each.ticket.key: each for each in live}
        return [by_key[key] for key in keys]

    def _advance(self, chosen: Sequence[LiveRequest]) -> None:
        """Run one forward and step each request by its own rows."""
        rows, shape = sum(live.rows for live in chosen), chosen[0].shape
        adapted = any(live.pages for live in chosen)
        began = self._clock()
        for live in chosen:
            live.begin(began)
        try:
            with self._watch.running(self.costs.seconds(shape, rows)):
                path = self.model.path(shape.height, shape.width, shape.text_tokens, rows, adapted)
                stepped = step_together(self.model, chosen)
        except Exception as error:
            failure = caught(error)
        else:
            seconds = self._clock() - began
            self._last_forward_s = seconds
            self._record.took(shape, rows, seconds, path)
            self._load.took(shape, rows, seconds)
            self._recovery.went_well(chosen)
            for live in chosen:
                self._energy.worked(live.ticket.key, live.rows * shape.tokens)
            members = tuple(
                Member(each.ticket.key, each.ticket.job.traceparent, each.state.step + 1, each.rows)
                for each in chosen
            )
            self._on_forward(Forward(seconds, shape, rows, path, members))
            for live, outcome in zip(chosen, stepped, strict=True):
                self._take(live, outcome, seconds, path)
            return
        for fewer in self._recovery.smaller(chosen, rows, failure):
            if self.is_alive:
                self._advance(fewer)

    def _take(
        self, live: LiveRequest, outcome: Stepped | Exception, seconds: float, path: Path
    ) -> None:
        """Carry one request over a step that was computed, and out if it was its last."""
        if isinstance(outcome, Exception):
            self._drop(live.ticket, told(outcome))
            return
        progress = live.advance(outcome.state, seconds, path)
        self._load.stepped(live)
        if outcome.denoised is not None:
            progress = replace(progress, preview=self._previewer.show(outcome.denoised))
        finished: Latents | KelvinError | None = None
        try:
            finished = self._finish(live) if live.is_finished else None
        except Exception as error:
            finished = told(error)
        self._tell(live.ticket, progress)
        if finished is not None:
            self._drop(live.ticket, finished)

    def _finish(self, live: LiveRequest) -> Latents:
        self._energy.settle()
        return live.result(self._clock(), self._energy.joules(live.ticket.key))

    def _drop(self, ticket: Ticket, last: Latents | Handover | KelvinError) -> None:
        self._recovery.forget(ticket)
        self._energy.forget(ticket.key)
        self._load.ended(ticket)
        self._loras.release(ticket)
        if not self._requests.remove(ticket):
            # Nothing of what is done outlives it.
            self._memory.forget()
            self._energy.settle()
        self._tell(ticket, last)

    def _tell(self, ticket: Ticket, event: DenoiseEvent | KelvinError) -> None:
        try:
            ticket.on_event(event)
        except Exception:
            # Whoever listened is gone; its request stops, the others go on.
            _log.exception("a listener failed on %s", type(event).__name__)
            ticket.cancel()
