"""Which tensors a configuration asks for, by name and shape, without building the model.

The names are those of diffusers' `SD3Transformer2DModel` and `AutoencoderKL` and of transformers'
`CLIPTextModelWithProjection` and `T5EncoderModel`; tests compare with the classes themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]
Config = Mapping[str, Any]


def transformer_shapes(config: Config) -> Shapes:
    """Return the tensors of SD3.5's transformer."""
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    patch, layers = config["patch_size"], config["num_layers"]
    channels, out = config["in_channels"], config["out_channels"]
    shapes: Shapes = {
        "pos_embed.pos_embed": (1, config["pos_embed_max_size"] ** 2, width),
        "pos_embed.proj.weight": (width, channels, patch, patch),
        "pos_embed.proj.bias": (width,),
    }
    time = "time_text_embed.timestep_embedder.linear_"
    text = "time_text_embed.text_embedder.linear_"
    shapes |= _linear(time + "1", 256, width) | _linear(time + "2", width, width)
    shapes |= _linear(text + "1", config["pooled_projection_dim"], width)
    shapes |= _linear(text + "2", width, width)
    caption = config["caption_projection_dim"]
    shapes |= _linear("context_embedder", config["joint_attention_dim"], caption)
    shapes |= _linear("norm_out.linear", width, 2 * width)
    shapes |= _linear("proj_out", width, patch * patch * out)
    for index in range(layers):
        block = f"transformer_blocks.{index}."
        last, dual = index == layers - 1, index in config["dual_attention_layers"]
        shapes |= _linear(block + "norm1.linear", width, (9 if dual else 6) * width)
        shapes |= _linear(block + "norm1_context.linear", width, (2 if last else 6) * width)
        attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
        for name in attention if last else (*attention, "to_add_out"):
            shapes |= _linear(f"{block}attn.{name}", width, width)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            shapes[f"{block}attn.{name}.weight"] = (head,)
        if dual:
            for name in attention[:4]:
                shapes |= _linear(f"{block}attn2.{name}", width, width)
            for name in ("norm_q", "norm_k"):
                shapes[f"{block}attn2.{name}.weight"] = (head,)
        for name in ("ff",) if last else ("ff", "ff_context"):
            shapes |= _linear(f"{block}{name}.net.0.proj", width, 4 * width)
            shapes |= _linear(f"{block}{name}.net.2", 4 * width, width)
    return shapes


def clip_shapes(config: Config) -> Shapes:
    """Return the tensors of a CLIP text encoder with its projection."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {
        "text_model.embeddings.token_embedding.weight": (config["vocab_size"], width),
        "text_model.embeddings.position_embedding.weight": (
            config["max_position_embeddings"],
            width,
        ),
        "text_projection.weight": (config["projection_dim"], width),
    } | _norm("text_model.final_layer_norm", width)
    for index in range(config["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{index}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}self_attn.{name}", width, width)
        shapes |= _linear(layer + "mlp.fc1", width, inner) | _linear(
            layer + "mlp.fc2", inner, width
        )
        shapes |= _norm(layer + "layer_norm1", width) | _norm(layer + "layer_norm2", width)
    return shapes


def t5_shapes(config: Config) -> Shapes:
    """Return the tensors of T5 v1.1's encoder; the embedding under its first name alone."""
    width, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    shapes: Shapes = {
        "shared.weight": (config["vocab_size"], width),
        "encoder.final_layer_norm.weight": (width,),
    }
    for index in range(config["num_layers"]):
        block = f"encoder.block.{index}.layer."
        for name in ("q", "k", "v"):
            shapes[f"{block}0.SelfAttention.{name}.weight"] = (inner, width)
        shapes[f"{block}0.SelfAttention.o.weight"] = (width, inner)
        if index == 0:
            shapes[f"{block}0.SelfAttention.relative_attention_bias.weight"] = (
                config["relative_attention_num_buckets"],
                config["num_heads"],
            )
        shapes[f"{block}0.layer_norm.weight"] = shapes[f"{block}1.layer_norm.weight"] = (width,)
        for name in ("wi_0", "wi_1"):
            shapes[f"{block}1.DenseReluDense.{name}.weight"] = (config["d_ff"], width)
        shapes[f"{block}1.DenseReluDense.wo.weight"] = (width, config["d_ff"])
    return shapes


def vae_shapes(config: Config) -> Shapes:
    """Return the tensors of both halves of the autoencoder."""
    channels, latent = config["block_out_channels"], config["latent_channels"]
    count = config["layers_per_block"]
    shapes = _conv("encoder.conv_in", 3, channels[0]) | _norm("encoder.conv_norm_out", channels[-1])
    shapes |= _conv("encoder.conv_out", channels[-1], 2 * latent)
    shapes |= _conv("decoder.conv_in", latent, channels[-1])
    shapes |= _norm("decoder.conv_norm_out", channels[0])
    shapes |= _conv("decoder.conv_out", channels[0], 3)
    for half in ("encoder", "decoder"):
        shapes |= _middle(half, channels[-1])
    for way, order, each in (
        ("encoder.down", channels, count),
        ("decoder.up", channels[::-1], count + 1),
    ):
        before = order[0]
        for index, size in enumerate(order):
            for at in range(each):
                name = f"{way}_blocks.{index}.resnets.{at}"
                shapes |= dict(_resnet(name, before if at == 0 else size, size))
            before = size
            if index < len(order) - 1:
                sampler = f"{way}_blocks.{index}.{way.partition('.')[2]}samplers.0.conv"
                shapes |= _conv(sampler, size, size)
    return shapes


def _middle(half: str, size: int) -> Shapes:
    shapes = _norm(f"{half}.mid_block.attentions.0.group_norm", size)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        shapes |= _linear(f"{half}.mid_block.attentions.0.{name}", size, size)
    for at in (0, 1):
        shapes |= dict(_resnet(f"{half}.mid_block.resnets.{at}", size, size))
    return shapes


def _resnet(name: str, before: int, after: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _norm(name + ".norm1", before).items()
    yield from _conv(name + ".conv1", before, after).items()
    yield from _norm(name + ".norm2", after).items()
    yield from _conv(name + ".conv2", after, after).items()
    if before != after:
        yield from _conv(name + ".conv_shortcut", before, after, 1).items()


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {name + ".weight": (outputs, inputs), name + ".bias": (outputs,)}


def _norm(name: str, width: int) -> Shapes:
    return {name + ".weight": (width,), name + ".bias": (width,)}


def _conv(name: str, inputs: int, outputs: int, side: int = 3) -> Shapes:
    return {name + ".weight": (outputs, inputs, side, side), name + ".bias": (outputs,)}
