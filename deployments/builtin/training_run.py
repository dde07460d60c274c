"""One whole training run: the order of its phases and what each leaves on disk."""

import argparse
import json
import platform
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import _dynamo

from deployments.builtin.architecture import BUILTIN, PICO, ModelSpec, Parts, build_parts, build_vae
from deployments.builtin.checkpoint import load_average
from deployments.builtin.conditioning import PromptEncoder
from deployments.builtin.data_parallel import Ranks
from deployments.builtin.dequantise import dequantised, read_weights
from deployments.builtin.evaluation import Evaluation, reconstruction_adherence
from deployments.builtin.example_stream import StreamSettings
from deployments.builtin.export import write_model
from deployments.builtin.flow_training import FlowTraining
from deployments.builtin.sample import Kind
from deployments.builtin.train_transformer import FlowTrainer
from deployments.builtin.train_vae import (
    VaeTrainer,
    VaeTraining,
    latent_statistics,
    peak_signal_to_noise,
)
from deployments.builtin.training_log import StopRequest, TrainingLog
from deployments.builtin.world import draw, sample_example

SQUARE = (256, 256)
OTHER_SIZES = ((224, 288), (288, 224), (192, 320), (320, 192))
_STATISTICS_SCENES = 96  # of each size
_VAE_FILE = "vae.safetensors"


def _is_model(directory: Path) -> bool:
    return (directory / "model_index.json").exists()


def _weights_of(directory: Path) -> dict[str, torch.Tensor]:
    """Float32 weights by parameter name, of an earlier run or of an exported model."""
    if not _is_model(directory):
        return load_average(directory / "ema")
    return {
        f"{part}.{name}": tensor
        for part in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
        for name, tensor in dequantised(read_weights(directory / part), torch.float32).items()
    }


def _load_autoencoder(vae: AutoencoderKL, directory: Path) -> dict[str, Any]:
    """Load the autoencoder of an earlier run or of an exported model; returns its record."""
    folder = directory / "vae"
    if not _is_model(directory):
        vae.load_state_dict(load_file(folder / _VAE_FILE))
        return dict(json.loads((folder / "vae.json").read_text(encoding="utf-8")))
    vae.load_state_dict(dequantised(read_weights(folder), torch.float32))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {name: config[name] for name in ("scaling_factor", "shift_factor")}


class TrainingRun:
    """Carries out the phases that the command line asks for.

    Args:
        options: of ``deployments.builtin.train``.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out
        self.smoke: bool = options.smoke
        self.ranks = Ranks.from_environment()
        self.device = self._choose_device()
        self.spec: ModelSpec = PICO if self.smoke else self._chosen_spec()
        name = "log.jsonl" if self.ranks.first else f"log-{self.ranks.rank}.jsonl"
        self.log = TrainingLog(self.out / name, echo=self.ranks.first)
        self.stop = StopRequest()
        self.encoder = PromptEncoder.for_spec(self.spec)
        self._set_up_torch()

    def _choose_device(self) -> torch.device:
        name = self.options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if name == "cuda":
            torch.cuda.set_device(self.ranks.local_rank)
            return torch.device("cuda", self.ranks.local_rank)
        return torch.device(name)

    def _chosen_spec(self) -> ModelSpec:
        options = self.options
        chosen = {
            "heads": options.heads,
            "layers": options.layers,
            "t5_head_width": options.t5_head_width,
        }
        return replace(BUILTIN, **{key: value for key, value in chosen.items() if value})

    def _set_up_torch(self) -> None:
        torch.manual_seed(self.options.seed)
        if self.smoke:
            torch.set_num_threads(1)  # a data worker takes the other core
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
            # The autoencoder's whole frames have a shape for each size, and a search for the best
            # algorithms of a new one took about ten seconds: a quarter of its training.
            torch.backends.cudnn.benchmark = False
        # One code object serves all blocks, at every token count, with and without gradients.
        _dynamo.config.recompile_limit = 64
        self.log.write(
            "start",
            torch=torch.__version__,
            python=platform.python_version(),
            device=torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            options={key: str(value) for key, value in vars(self.options).items()},
        )

    def run(self) -> None:
        """Autoencoder, transformer, export, evaluation, record.

        Raises:
            ValueError: several ranks, and no autoencoder to begin with.
        """
        self.ranks.join(self.device)
        self._run()
        # Not after an error: parting waits for the others, who wait for this rank.
        self.ranks.leave()

    def _run(self) -> None:
        vae, vae_record = self._autoencoder()
        parts, averaged = self._parts(), self._parts().eval().requires_grad_(False)
        self.log.write(
            "parameters",
            **{
                name: sum(parameter.numel() for parameter in module.parameters())
                for name, module in (*parts.named_children(), ("vae", vae))
            },
        )
        evaluation = Evaluation(
            averaged, vae, self.encoder, self.log, self.out, seed=self.options.seed, tiny=self.smoke
        )
        trainer = FlowTrainer(
            parts,
            averaged,
            vae,
            self.encoder,
            self._flow_training(),
            self._stream("flow", 16 if self.smoke else 512),
            self.log,
            self.stop,
            self.out,
            look=evaluation.look,
            export=lambda: self._export(averaged, vae),
            ranks=self.ranks,
        )
        if self.options.resume:
            trainer.resume(self.options.resume / "resume")
        elif self.options.init:
            trainer.start_from(_weights_of(self.options.init))
        flow_record = trainer.train()
        if not self.ranks.first:
            return
        self._record(vae_record, flow_record, evaluation.last)
        evaluation.final(trainer.step)
        evaluation.sheet(self.out / "samples.png")
        evaluation.wide_sheet(self.out / "samples-wide.png")
        self._record(vae_record, flow_record, evaluation.last)
        self._load_exported(averaged)
        evaluation.final(trainer.step, weights="fp8")
        self._record(vae_record, flow_record, evaluation.last)
        self.log.write("done", model=str(self.out / "model"))

    def _parts(self) -> Parts:
        encoder = self.encoder
        bos, eos = encoder.clip.bos_token_id, encoder.clip.eos_token_id
        return build_parts(self.spec, len(encoder.clip), len(encoder.t5), bos, eos).to(self.device)

    def _sizes(self) -> tuple[tuple[tuple[int, int], float], ...]:
        if self.smoke:
            return (((128, 128), 0.75), ((112, 144), 0.25))
        square = self.options.square
        share = (1 - square) / len(OTHER_SIZES)
        return ((SQUARE, square), *((size, share) for size in OTHER_SIZES if share > 0))

    def _stream(self, name: str, chunk: int) -> StreamSettings:
        options = self.options
        kinds: tuple[tuple[Kind, float], ...] = (
            ("core", options.core),
            ("hard", options.hard),
            ("terse", options.terse),
            ("word", options.word),
        )
        if self.ranks.rank:
            name = f"{name}:{self.ranks.rank}"
        return StreamSettings(
            seed=options.seed,
            name=name,
            chunk=chunk,
            sizes=self._sizes(),
            kinds=kinds,
            clip_length=self.spec.clip_length,
            t5_length=self.spec.t5_length,
        )

    def _flow_training(self) -> FlowTraining:
        options = self.options
        return FlowTraining(
            steps=options.steps or (8 if self.smoke else None),
            seconds=options.seconds,
            batch=8 if self.smoke else options.batch,
            muon_lr=options.muon_lr,
            adam_lr=options.adam_lr,
            weight_decay=options.weight_decay,
            hold=options.hold,
            ema_decay=options.ema_decay,
            caption_dropout=options.caption_dropout,
            time_mean=options.time_mean,
            time_std=options.time_std,
            reuse=options.reuse,
            workers=1 if self.smoke else options.workers,
            compile_blocks=not (options.no_compile or self.smoke),
            graphs=not (options.no_graphs or self.smoke),
            checkpoint_seconds=options.checkpoint_seconds,
            evaluate_seconds=options.evaluate_seconds,
            time_parts=options.time_parts,
        )

    def _autoencoder(self) -> tuple[AutoencoderKL, dict[str, Any]]:
        """Trained now, or taken from an earlier run; with its latent statistics in its config."""
        options = self.options
        vae = build_vae(self.spec).to(self.device)
        earlier: Path | None = options.resume or options.init or options.vae_from
        if earlier is None and self.ranks.world_size > 1:
            raise ValueError("the autoencoder is trained on one GPU: give its run to --vae-from")
        if earlier is not None:
            record = _load_autoencoder(vae, earlier)
        else:
            training = VaeTraining(
                steps=options.vae_steps or (8 if self.smoke else None),
                seconds=options.vae_seconds,
                batch=8 if self.smoke else options.vae_batch,
                crop=64 if self.smoke else 128,
                lr=options.vae_lr,
                workers=1 if self.smoke else options.workers,
            )
            stream = self._stream("vae", 16 if self.smoke else 512)
            trainer = VaeTrainer(vae, training, stream, self.log, self.stop)
            record = {"steps": trainer.train(), "batch": training.batch, "lr": training.lr}
            record |= self._measure(vae)
        vae.requires_grad_(False).eval()
        vae.register_to_config(
            scaling_factor=record["scaling_factor"], shift_factor=record["shift_factor"]
        )
        if self.ranks.first:
            self._save_autoencoder(vae, record)
        return vae, record

    def _measure(self, vae: AutoencoderKL) -> dict[str, float]:
        """Latent statistics over all sizes, and PSNR on unseen frames."""
        rng = random.Random(f"{self.options.seed}:measure")
        count = 8 if self.smoke else _STATISTICS_SCENES
        batches = []
        for (height, width), _ in self._sizes():
            kinds: tuple[Kind, ...] = ("core", "hard", "terse")
            scenes = [
                sample_example(rng, kinds[index % 3], "train", height, width).scene
                for index in range(count)
            ]
            batches.append(draw(scenes, self.device))
        statistics = latent_statistics(vae, batches)
        measured = {
            "scaling_factor": float(f"{1 / statistics.std:.5g}"),
            "shift_factor": float(f"{statistics.mean:.5g}"),
            "psnr_db": round(peak_signal_to_noise(vae, batches[0]), 2),
        }
        self.log.write("vae_measured", **measured)
        right = reconstruction_adherence(
            vae, 8 if self.smoke else 200, 128 if self.smoke else 256, self.device, 0
        )
        self.log.write("vae_reconstructions", **right)
        return measured | {"reconstructions_right": right.get("all", 0.0)}

    def _save_autoencoder(self, vae: AutoencoderKL, record: dict[str, Any]) -> None:
        directory = self.out / "vae"
        directory.mkdir(parents=True, exist_ok=True)
        save_file(vae.state_dict(), directory / _VAE_FILE)
        text = json.dumps(record, indent=2) + "\n"
        (directory / "vae.json").write_text(text, encoding="utf-8")

    def _export(self, averaged: Parts, vae: AutoencoderKL) -> None:
        write_model(self.out / "model", self.spec, averaged, vae, self.encoder)

    def _load_exported(self, averaged: Parts) -> None:
        """Put what was stored in FP8 into the averaged modules, to be measured in its turn."""
        for name, module in averaged.named_children():
            state = dequantised(read_weights(self.out / "model" / name), torch.float32)
            module.load_state_dict(state, strict=False)

    def _record(self, vae: dict[str, Any], flow: dict[str, Any], adherence: dict[str, Any]) -> None:
        files = [path for path in (self.out / "model").rglob("*") if path.is_file()]
        record = {
            "seed": self.options.seed,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "options": {key: str(value) for key, value in vars(self.options).items()},
            "vae": vae,
            "flow": flow,
            "adherence": adherence,
            "model_bytes": sum(path.stat().st_size for path in files),
        }
        text = json.dumps(record, indent=2) + "\n"
        (self.out / "training.json").write_text(text, encoding="utf-8")
        self.log.write("recorded", model_bytes=record["model_bytes"])
