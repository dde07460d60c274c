"""The arms that are compared on a card, built in one process over random weights of real size.

All draw their weights from the same seeds. `tutorial` and `compiled` share theirs, as the one is
the other compiled; what an arm holds is counted for each.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from deployments.sd3.mmdit import Mmdit
from deployments.sd3.precision import PrecisionChoice, choose_precision
from loadtest.peer_kelvin import KelvinArm
from loadtest.peer_pipelines import (
    DiffusersArm,
    Picture,
    assembled,
    compiled,
    quantise_by_torchao,
)
from loadtest.peer_settings import Cell, PictureAsked
from loadtest.sd35 import TEXT_TOKENS, random_transformer
from loadtest.stage_memory import REAL, TINY, random_decoder, random_text_encoders

ARMS = {
    "tutorial": "(a) diffusers' pipeline, bf16, one picture a call: Ray's own tutorial",
    "compiled": "(b) the same compiled, as many pictures a call as serve.batch gathers",
    "torchao": "(d) the compiled one with torchao's FP8 Linears",
    "kelvin": "Kelvin",
}


class Arm(Protocol):
    """Whoever makes pictures."""

    @property
    def weights_bytes(self) -> int:
        """Of all its models."""

    def make(self, asked: list[PictureAsked]) -> list[Picture]:
        """Make pictures as fast as it can when all are there at once."""

    def close(self) -> None:
        """Let go of everything."""


class ArmBuilder:
    """Builds arms for one cell on one device.

    Args:
        cell: Model and size.
        device: Where.
    """

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.cell = cell
        self.device = device
        self._sizes = TINY if cell.model.startswith("tiny") else REAL
        self._parts: dict[str, Any] | None = None
        self._plain: Any = None

    def build(self, name: str) -> Arm:
        """Load an arm's weights; it is not warm.

        Raises:
            KeyError: No such arm.
            ImportError: It needs a package that is not installed.
        """
        if name == "kelvin":
            return self._kelvin()
        batch = 1 if name == "tutorial" else self.cell.batch
        if name == "torchao":
            transformer = random_transformer(self.cell.model, self.device, torch.bfloat16)
            quantise_by_torchao(transformer)
            pipeline = compiled(assembled(transformer, self._shared()))
            return DiffusersArm(pipeline, batch)
        if name not in ARMS:
            raise KeyError(name)
        if self._plain is None:
            transformer = random_transformer(self.cell.model, self.device, torch.bfloat16)
            self._plain = assembled(transformer, self._shared())
        plain = self._plain
        return DiffusersArm(plain if name == "tutorial" else compiled(plain), batch)

    def share(self, names: list[str]) -> None:
        """Load what several of the named arms share, so that it is no single arm's growth."""
        if {"tutorial", "compiled"} & set(names):
            self.build("tutorial")
        elif "torchao" in names:
            self._shared()

    def _shared(self) -> dict[str, Any]:
        if self._parts is None:
            bf16 = choose_precision("bf16", self.device)
            text, vae = self._stages(bf16)
            (clip_l, token_l), (clip_g, token_g) = text.clips
            assert text.t5 is not None
            self._parts = {
                "vae": vae.model,
                "text_encoder": clip_l,
                "tokenizer": token_l.tokenizer,
                "text_encoder_2": clip_g,
                "tokenizer_2": token_g.tokenizer,
                "text_encoder_3": text.t5[0],
                "tokenizer_3": text.t5[1].tokenizer,
            }
        return self._parts

    def _kelvin(self) -> KelvinArm:
        precision = choose_precision("fp8", self.device)
        text, vae = self._stages(precision)
        transformer = random_transformer(self.cell.model, self.device, torch.bfloat16)
        mmdit = Mmdit.from_diffusers(transformer, self.device, precision)
        return KelvinArm(text, mmdit, vae, side=self.cell.side, text_tokens=TEXT_TOKENS)

    def _stages(self, precision: PrecisionChoice) -> tuple[Any, Any]:
        generator = torch.Generator(self.device).manual_seed(0)
        text = random_text_encoders(self.device, precision, self._sizes, generator)
        return text, random_decoder(self.device, precision, self._sizes["vae"], generator)
