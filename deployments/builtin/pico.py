"""``pico``: the built-in model's classes at their smallest, with random weights.

It shows nothing, but takes every path that a real model takes, in milliseconds: the model for
every test that is not about what pictures show.
"""

from pathlib import Path

import torch
from torch import nn

from deployments.builtin.architecture import PICO, Parts, build_parts, build_vae
from deployments.builtin.conditioning import PromptEncoder
from deployments.builtin.export import write_model
from deployments.builtin.grammar_tokenizers import CLIP_EOS


@torch.no_grad()
def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Weights that keep signals at their size, none of them zero: a skipped part must show."""
    for parameter in module.parameters():
        if parameter.ndim >= 2:
            spread = parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        else:
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.copy_(parameter + noise)


def build_pico(seed: int = 0) -> tuple[Parts, nn.Module, PromptEncoder]:
    """The parts, the autoencoder and the tokenizers; equal seeds give equal weights."""
    encoder = PromptEncoder.for_spec(PICO)
    eos = int(encoder.clip.convert_tokens_to_ids(CLIP_EOS))
    bos = int(encoder.clip.bos_token_id)
    parts = build_parts(PICO, len(encoder.clip), len(encoder.t5), bos, eos)
    vae = build_vae(PICO, scaling_factor=1.5, shift_factor=0.05)
    generator = torch.Generator().manual_seed(seed)
    for module in (parts, vae):
        _randomise(module, generator)
    return parts.eval(), vae.eval(), encoder


def write_pico(directory: Path, seed: int = 0) -> Path:
    """Write pico's model directory and return it."""
    parts, vae, encoder = build_pico(seed)
    write_model(directory, PICO, parts, vae, encoder)
    return directory
