"""The text and decode stages at SD3.5's real sizes with random weights: do they share a small card?

CLIP-L, CLIP-G and T5-XXL encode two prompts and the autoencoder decodes one picture, through the
served classes; only the tokenizers are made up.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import torch
import transformers
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from diffusers import AutoencoderKL
from torch import nn

from deployments.payloads import TextJob
from deployments.sd3.fp8 import Fp8Linear
from deployments.sd3.precision import PrecisionChoice
from deployments.sd3.text import TextEncoders
from deployments.sd3.tokens import PromptTokenizer
from deployments.sd3.vae import VaeDecoder
from loadtest.sd35 import random_values

GIB = 2**30

_CLIP_LENGTH, _T5_LENGTH = 77, 256
_JOINT_WIDTH = 4096
_CLIP_VOCABULARY = 49408

CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL = {
    "d_model": _JOINT_WIDTH,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
REAL: dict[str, dict[str, Any]] = {"clip_l": CLIP_L, "clip_g": CLIP_G, "t5": T5_XXL, "vae": VAE}
_SMALL_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 24,
}
TINY: dict[str, dict[str, Any]] = {
    "clip_l": CLIP_L | _SMALL_CLIP,
    "clip_g": CLIP_G | _SMALL_CLIP,
    "t5": T5_XXL | {"d_model": 96, "d_ff": 64, "num_heads": 2, "num_layers": 2, "vocab_size": 2048},
    "vae": VAE | {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4},
}


class _MadeUpTokenizer:
    """Gives a prompt as many tokens as there is room for, equal ones to equal prompts."""

    def __init__(self, longest: int, vocabulary: int) -> None:
        self.model_max_length = longest
        self.vocabulary = vocabulary

    def __call__(self, prompts: Sequence[str], **options: Any) -> SimpleNamespace:
        length = int(options.get("max_length", self.model_max_length))
        # The last is CLIP's end mark, the largest id, by which it finds what to pool.
        drawn = [torch.Generator().manual_seed(crc32(text.encode())) for text in prompts]
        ids = torch.stack(
            [torch.randint(3, self.vocabulary - 2, (length,), generator=each) for each in drawn]
        )
        ids[:, -1] = self.vocabulary - 1
        return SimpleNamespace(input_ids=ids if "return_tensors" in options else ids.tolist())


def measure_stages(
    device: torch.device,
    precision: PrecisionChoice,
    *,
    side: int = 1024,
    sizes: Mapping[str, dict[str, Any]] = REAL,
) -> dict[str, Any]:
    """Load both stages, encode two prompts and decode one picture.

    Args:
        device: Where.
        precision: Of the card; T5's Linears are FP8 if its weights are.
        side: Of the picture, pixels.
        sizes: `REAL`, or `TINY` for tests.

    Returns:
        GiB and milliseconds; peaks by torch's allocator and only on CUDA.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    generator = torch.Generator(device).manual_seed(0)
    text = random_text_encoders(device, precision, sizes, generator)
    vae = random_decoder(device, precision, sizes["vae"], generator)
    resident = {"text_gib": text.resident_bytes / GIB, "decode_gib": vae.resident_bytes / GIB}
    latents = torch.randn(16, side // 8, side // 8)
    job = TextJob("prompt", "prompt", "prompt", _T5_LENGTH)
    took: dict[str, list[float]] = {"encode_ms": [], "decode_ms": []}
    for _ in range(2):  # the first pays for what libraries set up
        began = time.perf_counter()
        text.encode([job, job])  # ends on the host
        took["encode_ms"].append(1000 * (time.perf_counter() - began))
        began = time.perf_counter()
        vae.decode(latents)
        took["decode_ms"].append(1000 * (time.perf_counter() - began))
    report: dict[str, Any] = {**resident, **{name: each[-1] for name, each in took.items()}}
    if device.type == "cuda":
        report["peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        report["peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
    return report


def random_text_encoders(
    device: torch.device,
    precision: PrecisionChoice,
    sizes: Mapping[str, dict[str, Any]],
    generator: torch.Generator,
) -> TextEncoders:
    """Make the served encoders with random weights and tokenizers that are made up.

    Args:
        device: Where.
        precision: Of the card; T5's Linears are FP8 if its weights are.
        sizes: `REAL` or `TINY`.
        generator: On the device; advances.
    """
    clips = []
    for name in ("clip_l", "clip_g"):
        settings = transformers.CLIPTextConfig(
            **sizes[name],
            vocab_size=_CLIP_VOCABULARY,
            max_position_embeddings=_CLIP_LENGTH,
            eos_token_id=_CLIP_VOCABULARY - 1,
        )
        with init_empty_weights(include_buffers=False):
            clip = transformers.CLIPTextModelWithProjection(settings)
        _fill(clip, device, precision, None, generator)
        tokenizer = _MadeUpTokenizer(_CLIP_LENGTH, _CLIP_VOCABULARY)
        clips.append((clip, PromptTokenizer(tokenizer, name)))
    settings = transformers.T5Config(**sizes["t5"])
    with init_empty_weights(include_buffers=False):
        t5 = transformers.T5EncoderModel(settings)
    _fill(t5, device, precision, "encoder.block.", generator)
    tokenizer = _MadeUpTokenizer(_T5_LENGTH, settings.vocab_size)
    return TextEncoders(
        clips, (t5, PromptTokenizer(tokenizer, "T5")), settings.d_model, device, precision
    )


def random_decoder(
    device: torch.device,
    precision: PrecisionChoice,
    settings: dict[str, Any],
    generator: torch.Generator,
) -> VaeDecoder:
    """Make the served decoder with random weights.

    Args:
        device: Where.
        precision: Of the card.
        settings: Of diffusers' `AutoencoderKL`, as in `REAL["vae"]`.
        generator: On the device; advances.
    """
    with init_empty_weights(include_buffers=False):
        model = AutoencoderKL(**settings)
    precision = precision.without_fp8("a VAE has no FP8 weights")
    _fill(model, device, precision, None, generator)
    return VaeDecoder(model, device, precision)


@torch.no_grad()
def _fill(
    model: nn.Module,
    device: torch.device,
    precision: PrecisionChoice,
    quantizable: str | None,
    generator: torch.Generator,
) -> None:
    """Give an empty model random weights, one tensor at a time, and quantise as a loader does."""
    filled: dict[int, nn.Parameter] = {}
    for name, empty in list(model.named_parameters(remove_duplicate=False)):
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if id(empty) not in filled:
            values = random_values(name, empty.shape, generator).to(precision.compute_dtype)
            filled[id(empty)] = nn.Parameter(values, requires_grad=False)
        owner._parameters[leaf] = filled[id(empty)]
        wanted = precision.weights == "fp8" and quantizable and name.startswith(quantizable)
        if wanted and isinstance(owner, nn.Linear):  # T5 has no biases
            layer = Fp8Linear.from_linear(owner, precision.fp8_arithmetic)
            model.set_submodule(owner_name, layer)
            del filled[id(empty)]
    for name, buffer in model.named_buffers():
        owner_name, _, leaf = name.rpartition(".")
        model.get_submodule(owner_name)._buffers[leaf] = buffer.to(device)
    model.eval()
