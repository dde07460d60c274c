"""What a training run looks at while it trains: pictures of unseen combinations, judged by code.

Small and quick, to watch the curve. The project's reported figures come from ``loadtest``.
"""

import random
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from deployments.builtin.architecture import Parts
from deployments.builtin.checker import Verdict, check
from deployments.builtin.conditioning import PromptEncoder
from deployments.builtin.flow_sampler import sample_frames
from deployments.builtin.sample_sheet import write_sheet
from deployments.builtin.scene import Example
from deployments.builtin.train_vae import decode_frames, encode_means
from deployments.builtin.training_log import TrainingLog
from deployments.builtin.world import Kind, draw, sample_example

_BATCH = 128
_SHEET_COLUMNS = 6
# (height, width) of the last row of a sheet: the model must hold at other aspect ratios
_SHEET_OTHER = (224, 288)


def summary(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of pictures with everything right, and of each attribute where it is stated."""
    if not verdicts:
        return {}
    counts: dict[str, list[bool]] = defaultdict(list)
    for verdict in verdicts:
        counts["all"].append(verdict.all_right)
        for name, right in verdict.attributes.items():
            counts[name].append(right)
    return {name: round(sum(values) / len(values), 3) for name, values in counts.items()}


def judge(frames: torch.Tensor, examples: Sequence[Example]) -> list[Verdict]:
    """Verdicts on uint8 frames [n, 3, height, width]."""
    pictures = frames.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [
        check(picture, example.claims) for picture, example in zip(pictures, examples, strict=True)
    ]


def reconstruction_adherence(
    vae: AutoencoderKL, count: int, size: int, device: torch.device, seed: int
) -> dict[str, float]:
    """The checker's verdict on core scenes that went through the autoencoder and back."""
    rng = random.Random(f"{seed}:reconstruction")
    examples = [sample_example(rng, "core", "train", size, size) for _ in range(count)]
    verdicts: list[Verdict] = []
    for start in range(0, count, _BATCH):
        batch = examples[start : start + _BATCH]
        frames = draw([example.scene for example in batch], device)
        verdicts += judge(decode_frames(vae, encode_means(vae, frames)), batch)
    return summary(verdicts)


class Evaluation:
    """Samples and judges the averaged model.

    Args:
        parts: holds the averaged weights when ``look`` is called.
        vae: the trained autoencoder.
        encoder: the tokenizers.
        log: where figures go.
        out: where sheets go.
        seed: of prompts and noise.
        tiny: a few small pictures only.
    """

    def __init__(
        self,
        parts: Parts,
        vae: AutoencoderKL,
        encoder: PromptEncoder,
        log: TrainingLog,
        out: Path,
        *,
        seed: int,
        tiny: bool,
    ) -> None:
        self.parts, self.vae, self.encoder = parts, vae, encoder
        self.log, self.out, self.seed, self.tiny = log, out, seed, tiny
        self.side = 128 if tiny else 256
        self.last: dict[str, Any] = {}

    def examples(self, kind: Kind, count: int) -> list[Example]:
        """Fixed held-out examples of one kind."""
        rng = random.Random(f"{self.seed}:look:{kind}")
        return [sample_example(rng, kind, "held_out", self.side, self.side) for _ in range(count)]

    def look(self, step: int) -> None:
        """A quick measurement and a sheet, while training goes on."""
        self._measure(step, core=4 if self.tiny else 64, hard=2 if self.tiny else 64, steps=12)
        self.sheet(self.out / "samples-latest.png", steps=12)

    def final(self, step: int, weights: str = "trained") -> None:
        """The larger measurement at the end; ``weights`` says which are in ``parts``."""
        core, hard = (4, 2) if self.tiny else (300, 150)
        steps = 4 if self.tiny else 20
        self._measure(step, core=core, hard=hard, steps=steps, weights=weights)

    def _measure(
        self, step: int, *, core: int, hard: int, steps: int, weights: str = "trained"
    ) -> None:
        began = time.monotonic()
        measured: dict[str, Any] = {"step": step, "sampling_steps": steps}
        kinds: tuple[tuple[Kind, int], ...] = (
            ("core", core),
            ("hard", hard),
            ("word", max(2, hard // 2)),
        )
        for kind, count in kinds:
            examples = self.examples(kind, count)
            verdicts: list[Verdict] = []
            for start in range(0, count, _BATCH):
                batch = examples[start : start + _BATCH]
                frames = self._sample([example.prompt for example in batch], steps, self.side)
                verdicts += judge(frames, batch)
            measured[kind] = summary(verdicts)
        self.last[weights] = measured
        self.log.write("adherence", weights=weights, **measured, seconds=time.monotonic() - began)

    def _sample(
        self, prompts: list[str], steps: int, height: int, width: int | None = None
    ) -> torch.Tensor:
        return sample_frames(
            self.parts,
            self.vae,
            self.encoder,
            prompts,
            height=height,
            width=width or height,
            steps=steps,
            seed=self.seed,
        )

    def sheet(self, path: Path, steps: int = 20) -> None:
        """Write a grid: two rows of core prompts, two of hard ones."""
        rows = 1 if self.tiny else 2
        count = rows * _SHEET_COLUMNS
        chosen = self.examples("core", count) + self.examples("hard", count)
        prompts = [example.prompt for example in chosen]
        frames = self._sample(prompts, 4 if self.tiny else steps, self.side)
        write_sheet(path, list(frames), prompts, _SHEET_COLUMNS)

    def wide_sheet(self, path: Path) -> None:
        """Write one row of core prompts at another aspect ratio."""
        prompts = [example.prompt for example in self.examples("core", _SHEET_COLUMNS)]
        height, width = (112, 144) if self.tiny else _SHEET_OTHER
        frames = self._sample(prompts, 4 if self.tiny else 20, height, width)
        write_sheet(path, list(frames), prompts, _SHEET_COLUMNS)
