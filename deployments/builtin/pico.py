"""``pico``: the built-in model's classes at their smallest, with random weights.

It shows nothing, but takes every path that a real model takes, in milliseconds: the model for
every test that is not about what pictures show.
"""

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn

from deployments.builtin.architecture import PICO, Parts, build_parts, build_vae
from deployments.builtin.conditioning import PromptEncoder
from deployments.builtin.export import write_model


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
    """Weights that keep signals at their size, none of them zero: a skipped part must show."""
    for parameter in module.parameters():
        if parameter.ndim >= 2:
            spread = parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape) * spread)
        else:
            parameter.add_(torch.randn(parameter.shape) * 0.05)


def build_pico(seed: int = 0) -> tuple[Parts, AutoencoderKL, PromptEncoder]:
    """The parts, the autoencoder and the tokenizers; equal seeds give equal weights."""
    encoder = PromptEncoder.for_spec(PICO)
    bos, eos = encoder.clip.bos_token_id, encoder.clip.eos_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = build_parts(PICO, len(encoder.clip), len(encoder.t5), bos, eos)
        vae = build_vae(PICO, scaling_factor=1.5, shift_factor=0.05)
        for module in (parts, vae):
            _randomise(module)
    return parts.eval(), vae.eval(), encoder


def write_pico(directory: Path, seed: int = 0) -> Path:
    """Write pico's model directory and return it."""
    parts, vae, encoder = build_pico(seed)
    write_model(directory, PICO, parts, vae, encoder)
    return directory
