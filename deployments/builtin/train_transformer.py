"""Training of the transformer with its three text encoders, by rectified flow.

Everything random about step ``s`` follows from ``(seed, rank, s)``: rows, noise, times, dropped
captions; its frame size from ``(seed, s)``, so that ranks take equally long. So a run bounded by
steps can be repeated, up to the rounding that a GPU's changing summation orders bring.
"""

import random
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import _dynamo

from deployments.builtin.architecture import LATENT_CHANNELS, LATENT_SCALE, Parts
from deployments.builtin.checkpoint import load_resume, save_average, save_resume
from deployments.builtin.conditioning import PromptEncoder
from deployments.builtin.data_parallel import Pace, Ranks
from deployments.builtin.example_stream import ExampleStream, StreamSettings
from deployments.builtin.flow_training import FlowTraining, learning_rate_factor
from deployments.builtin.frame_pool import FramePool, PoolFiller
from deployments.builtin.loss_watch import LossWatch
from deployments.builtin.optimizer import Optimizer, WeightAverage
from deployments.builtin.train_vae import encode_means
from deployments.builtin.training_log import Budget, StopRequest, TrainingLog
from deployments.builtin.velocity_step import StepInput, StepRunner

_RANK_STRIDE = 1 << 40  # between the seeds of two ranks' steps


class FlowTrainer:
    """Trains ``parts`` in place, and their average in ``averaged``.

    Args:
        parts: what is trained, on its device.
        averaged: modules of the same shape, which receive the averaged weights when looked at.
        vae: trained, with its factors in its config.
        encoder: the tokenizers.
        training: how.
        stream: of which examples.
        log: where progress goes.
        stop: ends the loop early.
        out: directory of checkpoints.
        look: called with the step, ``averaged`` holding current averages, now and then.
        export: called likewise at each checkpoint.
        ranks: who trains; only the first looks, saves and exports.
    """

    def __init__(
        self,
        parts: Parts,
        averaged: Parts,
        vae: AutoencoderKL,
        encoder: PromptEncoder,
        training: FlowTraining,
        stream: StreamSettings,
        log: TrainingLog,
        stop: StopRequest,
        out: Path,
        look: Callable[[int], None],
        export: Callable[[], None],
        ranks: Ranks | None = None,
    ) -> None:
        self.parts, self.averaged, self.vae = parts, averaged, vae
        self.training, self.stream_settings = training, stream
        self.log, self.stop, self.out, self.look, self.export = log, stop, out, look, export
        self.device = parts.device
        self.ranks = ranks or Ranks()
        self.rows_each = self.ranks.own_rows(training.batch)
        parts.train()
        if training.compile_blocks:
            for block in parts.transformer.transformer_blocks:
                block.compile(dynamic=False)
        self.optimizer = Optimizer(parts, training.muon_lr, training.adam_lr, training.weight_decay)
        self.average = WeightAverage(self.optimizer.parameters, training.ema_decay)
        self.runner = StepRunner(parts, self.optimizer.flat_gradient, training.graphs)
        empty = encoder.tokens([""])
        self.empty_clip, self.empty_t5 = empty.clip.to(self.device), empty.t5.to(self.device)
        self.generator = torch.Generator(self.device)
        self.step, self.chunks, self.spent_seconds = 0, 0, 0.0
        self.pools = self._make_pools()

    def _make_pools(self) -> dict[tuple[int, int], FramePool]:
        stream = self.stream_settings
        heaviest = max(weight for _, weight in stream.sizes)
        pools = {}
        for (height, width), weight in stream.sizes:
            share = 1 if weight == heaviest else 4
            chunks = max(1, self.training.pool_chunks // share)
            row = (LATENT_CHANNELS, height // LATENT_SCALE, width // LATENT_SCALE)
            pools[(height, width)] = FramePool(
                chunks * stream.chunk,
                row,
                torch.float16,
                stream.clip_length,
                stream.t5_length,
                self.device,
            )
        return pools

    def _encode(self, frames: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        means = encode_means(self.vae, frames)
        return (means - float(config.shift_factor)) * float(config.scaling_factor)

    def resume(self, directory: Path) -> None:
        """Continue from resume shards.

        Raises:
            FileNotFoundError: there are none.
            KeyError: they are of a model of another shape.
        """
        progress = load_resume(directory, self.parts, self.average, self.optimizer)
        self.step, self.chunks = int(progress["step"]), int(progress["chunks"])
        self.spent_seconds = float(progress["seconds"])
        self.log.write("resumed", step=self.step, seconds=self.spent_seconds)

    def start_from(self, weights: dict[str, torch.Tensor]) -> None:
        """Begin a fresh schedule from given weights by parameter name.

        Raises:
            KeyError: a weight is missing.
        """
        with torch.no_grad():
            for name, parameter in self.parts.named_parameters():
                parameter.copy_(weights[name])
            torch._foreach_copy_(self.average.average, self.optimizer.parameters)

    def train(self) -> dict[str, Any]:
        """Run until the budget is spent or a stop is asked for; returns what was done."""
        settings = replace(self.stream_settings, start=self.chunks)
        stream = ExampleStream(settings, self.training.workers)
        try:
            filler = PoolFiller(self.pools, self.device, self._encode)
            first = time.monotonic()
            while any(pool.filled == 0 for pool in self.pools.values()):
                self._put(stream, filler)
            self._put(stream, filler)
            self._take_over()
            self.log.write("pools_filled", seconds=time.monotonic() - first)
            self._warm_up()
            if self.training.time_parts and self.device.type == "cuda":
                self._time_parts(stream, filler)
                self._take_over()  # the optimizers took steps without averaging
            return self._loop(stream, filler)
        finally:
            stream.close()

    def _put(self, stream: ExampleStream, filler: PoolFiller) -> float:
        before = time.monotonic()
        chunk = stream.take()
        waited = time.monotonic() - before
        filler.put(chunk)
        self.chunks += 1
        return waited

    def _warm_up(self) -> None:
        """Compile and capture every frame size before the budget's clock starts."""
        for size in self.pools:
            began = time.monotonic()
            rows = self._rows(size, 0)
            loss = self._first_run(rows)
            value = float(loss.item())
            seconds = time.monotonic() - began
            self.log.write("warmed_up", size=list(size), loss=value, seconds=seconds)

    def _first_run(self, rows: StepInput) -> torch.Tensor:
        """Run a step; where graphs or the compiler fail, go on without them.

        Both are matters of speed, and a run that is slower beats one that is lost.
        """
        try:
            return self.runner(rows)
        except RuntimeError as error:
            if self.device.type != "cuda":
                raise
            self.log.write("graphs_off", error=repr(error)[:1500])
        torch.cuda.synchronize()
        self.runner = StepRunner(self.parts, self.optimizer.flat_gradient, use_graphs=False)
        try:
            return self.runner(rows)
        except RuntimeError as error:
            self.log.write("compiler_off", error=repr(error)[:1500])
        _dynamo.config.suppress_errors = True
        return self.runner(rows)

    def _time_parts(self, stream: ExampleStream, filler: PoolFiller) -> None:
        """Log how long each part of a step takes when it runs alone."""
        size = next(iter(self.pools))
        rows = self._rows(size, 0)
        actions: dict[str, Callable[[], object]] = {
            "rows": lambda: self._rows(size, 0),
            "forward_backward": lambda: self.runner(rows),
            "optimizer": lambda: self.optimizer.step(0.0),
            "average": lambda: self.average.update(0),
            "chunk": lambda: self._put(stream, filler),
        }
        measured: dict[str, float] = {}
        for name, action in actions.items():
            for repeat in range(6):
                if repeat == 1:
                    torch.cuda.synchronize()
                    began = time.monotonic()
                action()
            torch.cuda.synchronize()
            measured[f"{name}_ms"] = 1000 * (time.monotonic() - began) / 5
        peak = torch.cuda.max_memory_allocated() / 2**30
        reserved = torch.cuda.memory_reserved() / 2**30
        self.log.write("parts", **measured, peak_gib=peak, reserved_gib=reserved)

    def _rows(self, size: tuple[int, int], step: int) -> StepInput:
        """The rows of one step, from a generator seeded with it."""
        training = self.training
        seed = self.stream_settings.seed * 1_000_003 + step + self.ranks.rank * _RANK_STRIDE
        generator = self.generator.manual_seed(seed)
        latents, clip_ids, t5_ids = self.pools[size].sample(self.rows_each, generator)
        latents = latents.float()
        count = (self.rows_each,)
        noise = torch.randn(latents.shape, generator=generator, device=self.device)
        normal = torch.randn(count, generator=generator, device=self.device)
        dropped = torch.rand(count, generator=generator, device=self.device)
        empty = (dropped < training.caption_dropout)[:, None]
        return StepInput(
            latents=latents,
            noise=noise,
            sigmas=torch.sigmoid(training.time_mean + training.time_std * normal),
            clip_ids=torch.where(empty, self.empty_clip, clip_ids),
            t5_ids=torch.where(empty, self.empty_t5, t5_ids),
        )

    def _size(self, step: int) -> tuple[int, int]:
        sizes = self.stream_settings.sizes
        rng = random.Random(f"{self.stream_settings.seed}:step:{step}")
        return rng.choices([size for size, _ in sizes], [weight for _, weight in sizes])[0]

    def _loop(self, stream: ExampleStream, filler: PoolFiller) -> dict[str, Any]:
        training, ranks = self.training, self.ranks
        budget = Budget(training.steps, training.seconds, self.spent_seconds)
        every = max(1, training.reuse * self.stream_settings.chunk // self.rows_each)
        watch = LossWatch(self.live, self.log, budget, training.batch)
        checkpointed = looked = time.monotonic()
        factor = 0.0
        while True:
            now = time.monotonic()
            checkpoint_due = now - checkpointed > training.checkpoint_seconds
            look_due = now - looked > training.evaluate_seconds
            pace = ranks.share_pace(
                Pace(
                    progress=budget.progress(self.step),
                    stop=budget.progress(self.step) >= 1 or self.stop.asked,
                    report=checkpoint_due or look_due or watch.due,
                    checkpoint=checkpoint_due,
                    look=look_due,
                )
            )
            if pace.report or pace.stop:
                watch.report(self.step, factor, pace.progress)
            if pace.stop:
                break
            if pace.checkpoint:
                self.checkpoint(budget.elapsed_seconds)
                checkpointed = time.monotonic()
            if pace.look:
                self._look()
                looked = time.monotonic()
            if pace.checkpoint or pace.look:
                watch.restart()
            loss = self.runner(self._rows(self._size(self.step), self.step))
            ranks.average(self.optimizer.flat_gradient, loss)
            factor = watch.damping * learning_rate_factor(self.step, pace.progress, training)
            norm = self.optimizer.step(factor)
            self.step += 1
            self.average.update(self.step)
            watch.add(loss, norm)
            if self.step % every == 0:
                watch.waited += self._put(stream, filler)
        elapsed = budget.elapsed_seconds
        self.checkpoint(elapsed)
        self._look()
        done = {
            "steps": self.step,
            "seconds": elapsed,
            "samples": self.step * training.batch,
            "chunks": self.chunks,
            "restores": watch.restores,
            "stopped_early": self.stop.asked,
        }
        self.log.write("flow_trained", **done)
        return done | {"settings": asdict(training)}

    def _take_over(self) -> None:
        """Hold what rank 0 holds; counters that optimizers keep on the CPU never differ."""
        self.ranks.share([tensor for tensor in self.live() if tensor.device == self.device])

    def live(self) -> list[torch.Tensor]:
        """Every tensor that a step changes."""
        state = self.optimizer.state_tensors().values()
        weights = [parameter.data for parameter in self.optimizer.parameters]
        return [*weights, *self.average.average, *state]

    @torch.no_grad()
    def _load_average(self) -> None:
        torch._foreach_copy_(list(self.averaged.parameters()), self.average.average)

    def _look(self) -> None:
        """Show the average to whoever evaluates it; a failure there must not end the training."""
        if not self.ranks.first:
            return
        self._load_average()
        try:
            self.look(self.step)
        except Exception as error:  # the run is worth more than one evaluation
            self.log.write("look_failed", error=repr(error)[:500])

    def checkpoint(self, seconds: float) -> None:
        """Save averages, resume state and an exported model; a full disk must not end a run.

        Other ranks than the first only take over its state, should theirs have drifted.
        """
        began = time.monotonic()
        drift = self.ranks.drift(self.optimizer.parameters)
        self._take_over()
        if not self.ranks.first:
            return
        self._load_average()
        progress = {"step": self.step, "chunks": self.chunks, "seconds": seconds}
        try:
            self.export()
            save_average(self.out / "ema", self.parts, self.average)
            save_resume(self.out / "resume", self.parts, self.average, self.optimizer, progress)
        except Exception as error:  # the next checkpoint may fare better
            self.log.write("checkpoint_failed", step=self.step, error=repr(error)[:500])
        else:
            self.log.write(
                "checkpoint", step=self.step, drift=drift, seconds=time.monotonic() - began
            )
