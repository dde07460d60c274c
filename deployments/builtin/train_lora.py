"""Trains the LoRA that teaches the built-in model a ninth shape, the bolt.

    python -m deployments.builtin.train_lora --out DIR

writes ``DIR/bolt.safetensors`` in the format of diffusers, and ``DIR/log.jsonl``. The shipped
weights stay frozen, in float32; only side branches of the transformer's attention learn, from drawn
bolts and, so that the rest stays as it is, from ordinary scenes. ``--smoke`` takes a few small
steps. ``python -m loadtest.lora_adherence`` then measures what the file does.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import _dynamo

from deployments.builtin.architecture import (
    BUILTIN,
    LATENT_CHANNELS,
    LATENT_SCALE,
    Parts,
    build_parts,
    build_vae,
)
from deployments.builtin.conditioning import PromptEncoder
from deployments.builtin.dequantise import load_dequantised
from deployments.builtin.evaluation import judge, summary
from deployments.builtin.example_stream import Chunk
from deployments.builtin.flow_sampler import sample_frames
from deployments.builtin.flow_training import FlowTraining, learning_rate_factor
from deployments.builtin.frame_pool import FramePool, PoolFiller
from deployments.builtin.lora_branches import (
    ATTENTION,
    FEED_FORWARD,
    add_branches,
    load_branches,
    save_lora,
)
from deployments.builtin.sample import Kind, sample_example
from deployments.builtin.taught import taught_example
from deployments.builtin.train_vae import encode_means
from deployments.builtin.training_log import Budget, StopRequest, TrainingLog
from deployments.builtin.velocity_step import StepInput, StepRunner
from deployments.builtin.vocabulary import TAUGHT_SHAPES

WEIGHTS = Path(__file__).parent / "weights"
_SIDE_PX = 256
_TAUGHT_KINDS: tuple[tuple[Kind, float], ...] = (("core", 0.65), ("hard", 0.2), ("terse", 0.15))
_OTHER_KINDS: tuple[tuple[Kind, float], ...] = (
    ("core", 0.4),
    ("hard", 0.35),
    ("terse", 0.1),
    ("word", 0.15),
)
_LOOK_PROMPTS = 24


class LoraTraining:
    """One run.

    Args:
        options: of ``parse_arguments``.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.training = FlowTraining(
            steps=options.steps,
            seconds=options.seconds,
            batch=options.batch,
            adam_lr=options.lr,
            warmup_steps=options.warmup_steps,
            reuse=options.reuse,
        )
        self.log = TrainingLog(options.out / "log.jsonl")
        self.log.write(
            "start",
            torch=torch.__version__,
            device=torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            options={key: str(value) for key, value in vars(options).items()},
        )
        torch.manual_seed(options.seed)
        torch.backends.cuda.matmul.allow_tf32 = True
        self.rng = random.Random(f"{options.seed}:lora")
        self.generator = torch.Generator(self.device).manual_seed(options.seed)
        self.encoder = PromptEncoder.for_spec(BUILTIN)
        self.parts, self.vae = self._models()
        targets = (*ATTENTION, *FEED_FORWARD) if options.feed_forward else ATTENTION
        self.branches = add_branches(self.parts.transformer, options.rank, targets)
        if options.init:
            load_branches(options.init, self.branches)
        self.learned = [
            side for branch in self.branches.values() for side in (branch.lora_A, branch.lora_B)
        ]
        self.runner = self._runner()
        self.optimizer = torch.optim.AdamW(
            self.learned, options.lr, betas=(0.9, 0.99), weight_decay=0.0
        )
        side = _SIDE_PX // LATENT_SCALE
        self.pool = FramePool(
            options.pool_chunks * options.batch,
            (LATENT_CHANNELS, side, side),
            torch.float16,
            BUILTIN.clip_length,
            BUILTIN.t5_length,
            self.device,
        )
        self.filler = PoolFiller({(_SIDE_PX, _SIDE_PX): self.pool}, self.device, self._encode)

    def _models(self) -> tuple[Parts, AutoencoderKL]:
        clip = self.encoder.clip
        parts = build_parts(
            BUILTIN, len(clip), len(self.encoder.t5), clip.bos_token_id, clip.eos_token_id
        )
        vae = build_vae(BUILTIN)
        load_dequantised(parts, vae, WEIGHTS)
        for module in (parts, vae):
            module.to(self.device).eval().requires_grad_(False)
        return parts, vae

    def _runner(self) -> StepRunner:
        """Steps whose gradients lie in one piece, as graphs need them."""
        gradient = torch.zeros(sum(side.numel() for side in self.learned), device=self.device)
        parts = torch.split(gradient, [side.numel() for side in self.learned])
        for side, part in zip(self.learned, parts, strict=True):
            side.grad = part.view_as(side)
        if self.device.type == "cuda" and not self.options.no_compile:
            _dynamo.config.recompile_limit = 64  # one code object serves all blocks
            for block in self.parts.transformer.transformer_blocks:
                block.compile(dynamic=False)
        return StepRunner(self.parts, gradient, not self.options.no_graphs, bfloat16=True)

    def _encode(self, frames: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        means = encode_means(self.vae, frames)
        return (means - float(config.shift_factor)) * float(config.scaling_factor)

    def _chunk(self) -> Chunk:
        """As many new examples as a step has rows.

        Captions are dropped, for guidance, from ordinary scenes only: what the model draws when
        nothing is asked must not change.
        """
        examples, prompts = [], []
        for _ in range(self.options.batch):
            if self.rng.random() < self.options.taught:
                kind = self._kind(_TAUGHT_KINDS)
                examples.append(taught_example(self.rng, self.options.shape, kind))
                prompts.append(examples[-1].prompt)
            else:
                examples.append(sample_example(self.rng, self._kind(_OTHER_KINDS)))
                dropped = self.rng.random() < self.training.caption_dropout
                prompts.append("" if dropped else examples[-1].prompt)
        tokens = self.encoder.tokens(prompts)
        return Chunk(
            index=0,
            size=(_SIDE_PX, _SIDE_PX),
            scenes=[example.scene for example in examples],
            clip_ids=tokens.clip.short().numpy(),
            t5_ids=tokens.t5.short().numpy(),
        )

    def _kind(self, kinds: tuple[tuple[Kind, float], ...]) -> Kind:
        return self.rng.choices([kind for kind, _ in kinds], [share for _, share in kinds])[0]

    def _rows(self) -> StepInput:
        count, generator = self.options.batch, self.generator
        latents, clip_ids, t5_ids = self.pool.sample(count, generator)
        latents = latents.float()
        normal = torch.randn(count, generator=generator, device=self.device)
        return StepInput(
            latents=latents,
            noise=torch.randn(latents.shape, generator=generator, device=self.device),
            sigmas=torch.sigmoid(self.training.time_mean + self.training.time_std * normal),
            clip_ids=clip_ids,
            t5_ids=t5_ids,
        )

    def run(self) -> Path:
        """Train until the budget is spent, and return the file."""
        options, stop = self.options, StopRequest()
        for _ in range(options.first_chunks):
            self.filler.put(self._chunk())
        self.log.write("pool_filled", rows=self.pool.filled, branches=len(self.branches))
        self.runner(self._rows())  # compile and capture before the budget's clock starts
        self.log.write("warmed_up")
        budget = Budget(options.steps, options.seconds)
        step, losses, reported = 0, [], time.monotonic()
        while budget.progress(step) < 1 and not stop.asked:
            loss = self.runner(self._rows())
            norm = torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
            factor = learning_rate_factor(step, budget.progress(step), self.training)
            for group in self.optimizer.param_groups:
                group["lr"] = factor * options.lr
            self.optimizer.step()
            step += 1
            losses.append(loss.clone())
            if len(losses) == options.report_steps:
                now = time.monotonic()
                self.log.write(
                    "flow",
                    step=step,
                    elapsed_s=budget.elapsed_seconds,
                    loss=float(torch.stack(losses).mean()),
                    norm=float(norm),
                    factor=factor,
                    ms_per_step=1000 * (now - reported) / len(losses),
                )
                losses, reported = [], now
            if step % options.reuse == 0:
                self.filler.put(self._chunk())
        path: Path = options.out / f"{options.shape}.safetensors"
        save_lora(path, self.branches)
        self.log.write("trained", steps=step, seconds=budget.elapsed_seconds)
        self._look(step)
        return path

    def _look(self, step: int) -> None:
        """A first impression; ``loadtest.lora_adherence`` measures."""
        rng = random.Random(f"{self.options.seed}:look")
        examples = [
            taught_example(rng, self.options.shape, "core") for _ in range(self.options.look)
        ]
        prompts = [example.prompt for example in examples]
        with torch.compiler.set_stance("force_eager"):  # another batch would be compiled anew
            frames = sample_frames(
                self.parts,
                self.vae,
                self.encoder,
                prompts,
                height=_SIDE_PX,
                width=_SIDE_PX,
                steps=self.options.look_steps,
            )
        self.log.write("look", step=step, taught=summary(judge(frames, examples)))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(prog="python -m deployments.builtin.train_lora")
    add = parser.add_argument
    on_gpu = torch.cuda.is_available()
    add("--out", type=Path, required=True, help="directory of everything that is written")
    add("--shape", choices=TAUGHT_SHAPES, default="bolt")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--smoke", action="store_true", help="a few small steps, seconds on a CPU")
    add("--rank", type=int, default=8)
    add("--init", type=Path, help="file of an earlier run, to begin from")
    add("--feed-forward", action="store_true", help="branches there too, not on attention alone")
    add("--no-compile", action="store_true")
    add("--no-graphs", action="store_true", help="launch kernels singly")
    add("--seconds", type=float, default=120.0)
    add("--steps", type=int, help="bound of the training, instead of seconds")
    add("--batch", type=int, default=256 if on_gpu else 32)
    add("--lr", type=float, default=4e-3)
    add("--warmup-steps", type=int, default=20)
    add("--taught", type=float, default=0.6, help="share of rows with the new shape")
    add("--reuse", type=int, default=8, help="steps between batches of new rows")
    add("--pool-chunks", type=int, default=32, help="batches of rows that are kept")
    options = parser.parse_args(arguments)
    options.first_chunks, options.report_steps = 4, 10
    options.look, options.look_steps = _LOOK_PROMPTS, 12
    if options.smoke:
        options.steps, options.batch, options.first_chunks = 3, 2, 1
        options.report_steps, options.look, options.look_steps = 1, 1, 2
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the training that the command line asks for."""
    LoraTraining(parse_arguments(arguments)).run()


if __name__ == "__main__":
    main()
