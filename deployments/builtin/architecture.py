"""The shapes of the built-in model and of ``pico``: SD3.5's own classes, made small.

One ``ModelSpec`` fixes every part, so training, export and tests build the same thing. The real
classes of diffusers and transformers are used: whatever reads a Stable Diffusion 3.5 directory
reads this one.
"""

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

LATENT_CHANNELS = 16
LATENT_SCALE = 8  # pixels per latent, each way
PATCH = 2  # latents per token, each way
_NEIGHBOURS = (-1, 1, -2, 2, -3, 3)  # where T5's heads look at first, in tokens
_NEIGHBOUR_BIAS = 5.0  # about three quarters of the attention, among 48 tokens
_T5_BUCKETS = 32
SHIFT = 3.0  # of the flow-matching schedule, as SD3.5 ships it


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Widths, depths and limits of one model; the defaults are the built-in model's.

    Attributes:
        name: what requests call it.
        heads: attention heads of the transformer; its width is ``heads * head_width``.
        head_width: channels of one head.
        layers: joint blocks of the transformer.
        clip_widths: hidden width of the two CLIP text encoders, which is also their projection.
        clip_layers: layers of each; SD3 reads the last but one.
        clip_length: tokens of a CLIP prompt.
        t5_width: hidden width of the T5 encoder, which is SD3's ``joint_attention_dim``.
        t5_head_width: channels of one of its attention heads.
        t5_hidden: inner width of its gated feed-forward.
        t5_layers: its layers.
        t5_length: tokens of a T5 prompt (``max_sequence_length``).
        vae_channels: channels of the four resolutions of the autoencoder.
        vae_groups: groups of its group norms.
        default_size: side of the default picture, pixels.
        min_size: smallest side, pixels.
        max_size: largest side, pixels: the table of position embeddings ends there.
        largest_side: side up to which it is continued for who asks, pixels.
        trained_sides: shortest and longest side that training saw, pixels; none: no training.
    """

    name: str = "builtin"
    heads: int = 4
    head_width: int = 64
    layers: int = 9
    clip_widths: tuple[int, int] = (96, 128)
    clip_layers: int = 2
    clip_length: int = 32
    t5_width: int = 256
    t5_head_width: int = 32
    t5_hidden: int = 320
    t5_layers: int = 4
    t5_length: int = 48
    vae_channels: tuple[int, int, int, int] = (32, 64, 96, 96)
    vae_groups: int = 16
    default_size: int = 256
    min_size: int = 128
    max_size: int = 512
    largest_side: int = 1024
    trained_sides: tuple[int, int] | None = (192, 320)

    @property
    def width(self) -> int:
        """Width of the transformer."""
        return self.heads * self.head_width


BUILTIN = ModelSpec()
PICO = ModelSpec(
    name="pico",
    heads=2,
    head_width=16,
    layers=2,
    clip_widths=(32, 32),
    clip_layers=2,
    t5_width=64,
    t5_head_width=64,
    t5_hidden=96,
    t5_layers=1,
    vae_channels=(8, 8, 16, 16),
    vae_groups=4,
    default_size=64,
    min_size=64,
    max_size=256,
    trained_sides=None,
)


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def build_transformer(spec: ModelSpec) -> SD3Transformer2DModel:
    """The joint transformer, AdaLN and output zero-initialised (Peebles and Xie, 2023).

    Zero gates make each block the identity at the start, so that depth costs no stability.
    """
    transformer = SD3Transformer2DModel(
        sample_size=spec.default_size // LATENT_SCALE,
        patch_size=PATCH,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=spec.layers,
        attention_head_dim=spec.head_width,
        num_attention_heads=spec.heads,
        joint_attention_dim=spec.t5_width,
        caption_projection_dim=spec.width,
        pooled_projection_dim=sum(spec.clip_widths),
        pos_embed_max_size=spec.max_size // (LATENT_SCALE * PATCH),
        qk_norm="rms_norm",
    )
    for block in transformer.transformer_blocks:
        _zero(block.norm1.linear)
        _zero(block.norm1_context.linear)
    _zero(transformer.norm_out.linear)
    _zero(transformer.proj_out)
    return transformer


def build_vae(
    spec: ModelSpec, scaling_factor: float = 1.0, shift_factor: float = 0.0
) -> AutoencoderKL:
    """The autoencoder: 16 latent channels, an eighth of the side, no quant convolutions."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=spec.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=spec.vae_groups,
        sample_size=spec.default_size,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def build_clip(
    spec: ModelSpec, which: int, vocabulary: int, bos_token_id: int, eos_token_id: int
) -> CLIPTextModelWithProjection:
    """One of the two CLIP text encoders (``which`` is 0 or 1), with SD3's activations."""
    width = spec.clip_widths[which]
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=spec.clip_layers,
            num_attention_heads=width // 32,
            max_position_embeddings=spec.clip_length,
            hidden_act=("quick_gelu", "gelu")[which],
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
        )
    )


def build_t5(spec: ModelSpec, vocabulary: int) -> T5EncoderModel:
    """The T5 v1.1 encoder: gated GELU, no bias, relative positions.

    Its heads begin by looking at one neighbour each. T5 knows order from its relative bias alone,
    and one that starts near zero stayed there (at most 0.2 after 6,500 steps): a letter's place in
    its word could then be read from its state no better than by chance (28 % of four places, with a
    linear probe). With neighbours from the start it is 98 % before any training.
    """
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=spec.t5_width,
            d_kv=spec.t5_head_width,
            d_ff=spec.t5_hidden,
            num_layers=spec.t5_layers,
            num_heads=spec.t5_width // spec.t5_head_width,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    nn.init.zeros_(bias)
    with torch.no_grad():
        # One head in four looks freely.
        for head, offset in zip(range(bias.shape[1] * 3 // 4), _NEIGHBOURS, strict=False):
            bias[_bucket(offset), head] = _NEIGHBOUR_BIAS
    return encoder


def _bucket(offset: int) -> int:
    """T5's bucket of a key ``offset`` tokens after the query, for less than 8 either way."""
    return -offset if offset <= 0 else _T5_BUCKETS // 2 + offset


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """SD3.5's scheduler."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)


class Parts(nn.Module):
    """What is trained together: the transformer and its three text encoders.

    Attribute names are the folder names of a Diffusers directory.
    """

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        text_encoder: CLIPTextModelWithProjection,
        text_encoder_2: CLIPTextModelWithProjection,
        text_encoder_3: T5EncoderModel,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.text_encoder_3 = text_encoder_3

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


def build_parts(
    spec: ModelSpec, clip_vocabulary: int, t5_vocabulary: int, clip_bos: int, clip_eos: int
) -> Parts:
    """Transformer and text encoders with fresh weights from torch's global generator."""
    return Parts(
        build_transformer(spec),
        build_clip(spec, 0, clip_vocabulary, clip_bos, clip_eos),
        build_clip(spec, 1, clip_vocabulary, clip_bos, clip_eos),
        build_t5(spec, t5_vocabulary),
    )
