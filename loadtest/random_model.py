"""A whole SD3.5 on disk with random weights of real size, for services: all of Diffusers' folders.

Its tokenizers are those of the built-in model, which know few words: a prompt has as many tokens as
is asked for, whatever they are.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from deployments.builtin.architecture import build_scheduler
from deployments.builtin.export import model_index
from deployments.builtin.grammar_tokenizers import build_clip_tokenizer, build_t5_tokenizer
from deployments.sd3.precision import choose_precision
from loadtest.random_checkpoint import write_random_checkpoint
from loadtest.stage_memory import REAL, TINY, random_decoder, random_text_encoders

_CLIP_TOKENS, _T5_TOKENS = 77, 256


@torch.no_grad()
def write_random_model(folder: Path, name: str, device: torch.device, seed: int = 0) -> None:
    """Write a model in bfloat16, as published ones are.

    A folder that was finished is left as it is.

    Args:
        folder: In Diffusers layout.
        name: As `loadtest.sd35.config` takes it.
        device: Where weights are drawn.
        seed: Of the weights.
    """
    index = folder / "model_index.json"  # last of all: the folder is whole once it is there
    if index.exists():
        return
    write_random_checkpoint(folder, name, device, seed, fp8=False)
    sizes = TINY if name.startswith("tiny") else REAL
    generator = torch.Generator(device).manual_seed(seed)
    _write_text_encoders(folder, sizes, device, generator)
    vae = random_decoder(device, choose_precision("bf16", device), sizes["vae"], generator).model
    vae.to(memory_format=torch.contiguous_format).save_pretrained(folder / "vae")
    build_scheduler().save_pretrained(str(folder / "scheduler"))
    own = {"name": f"random-{name}", "license": "none: nobody trained these weights"}
    (folder / "kelvin.json").write_text(json.dumps(own), encoding="utf-8")
    part = index.with_suffix(".part")
    part.write_text(json.dumps(model_index()), encoding="utf-8")
    os.replace(part, index)


def _write_text_encoders(
    folder: Path,
    sizes: dict[str, dict[str, object]],
    device: torch.device,
    generator: torch.Generator,
) -> None:
    text = random_text_encoders(device, choose_precision("bf16", device), sizes, generator)
    clip_tokenizer = build_clip_tokenizer(_CLIP_TOKENS)
    for suffix, (clip, _) in zip(("", "_2"), text.clips, strict=True):
        # By the end mark a CLIP finds the state that it pools.
        clip.config.eos_token_id = clip_tokenizer.eos_token_id
        clip.config.bos_token_id = clip_tokenizer.bos_token_id
        clip.save_pretrained(folder / f"text_encoder{suffix}")
        clip_tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
    assert text.t5 is not None, "random_text_encoders makes all three"
    text.t5[0].save_pretrained(folder / "text_encoder_3")
    build_t5_tokenizer(_T5_TOKENS).save_pretrained(folder / "tokenizer_3")
