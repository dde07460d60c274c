"""Euler sampling with classifier-free guidance, for looking at a model while it trains.

Serving has its own samplers; this one is as short as possible and runs everything in one batch.
"""

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from deployments.builtin.architecture import LATENT_CHANNELS, LATENT_SCALE, Parts, build_scheduler
from deployments.builtin.conditioning import PromptEncoder, encode_tokens
from deployments.builtin.train_vae import decode_frames


@torch.no_grad()
def sample_frames(
    parts: Parts,
    vae: AutoencoderKL,
    encoder: PromptEncoder,
    prompts: list[str],
    *,
    height: int,
    width: int,
    steps: int,
    guidance_scale: float = 4.0,
    seed: int = 0,
) -> torch.Tensor:
    """Pictures of prompts.

    Args:
        parts: transformer and text encoders.
        vae: with its scaling and shift factors in its config.
        encoder: the model's tokenizers.
        prompts: one for each picture.
        height: pixels.
        width: pixels.
        steps: Euler steps.
        guidance_scale: 1 turns guidance off.
        seed: of the starting noise, drawn on the CPU so that every device starts alike.

    Returns:
        uint8 [prompts, 3, height, width] on the model's device.
    """
    device = parts.device
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    sigmas = [float(sigma) for sigma in scheduler.sigmas]
    tokens = encoder.tokens([*prompts, *("" for _ in prompts)])
    generator = torch.Generator().manual_seed(seed)
    shape = (len(prompts), LATENT_CHANNELS, height // LATENT_SCALE, width // LATENT_SCALE)
    latents = torch.randn(shape, generator=generator).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        embeds, pooled = encode_tokens(parts, tokens.clip.to(device), tokens.t5.to(device))
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            both = parts.transformer(
                hidden_states=torch.cat([latents, latents]),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                timestep=torch.full((2 * len(prompts),), sigma * 1000, device=device),
                return_dict=False,
            )[0].float()
            stated, empty = both.chunk(2)
            velocity = empty + guidance_scale * (stated - empty)
            latents = latents + (following - sigma) * velocity
    config = vae.config
    return decode_frames(vae, latents / config.scaling_factor + config.shift_factor)
