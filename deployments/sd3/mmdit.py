"""SD3's denoising transformer: noisy latents and a prompt in, velocity out.

Rows are independent: whether two rows are one request's guidance pair or two requests is not known
here, and nothing computed for one row touches another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from deployments.sd3.attention import Attention
from deployments.sd3.checkpoint import load_component, resident_bytes
from deployments.sd3.cuda_graphs import CudaGraphs
from deployments.sd3.fp8 import quantize_linears
from deployments.sd3.host_memory import keep_freed_memory
from deployments.sd3.int8 import become_int8_
from deployments.sd3.lora_arena import LoraArena
from deployments.sd3.lora_layers import PageUse, RowLoras
from deployments.sd3.optimizations import Optimizations
from deployments.sd3.precision import PrecisionChoice, as_choice
from deployments.sd3.sigmas import TRAIN_TIMESTEPS
from deployments.sd3.stored_tensors import read_json
from deployments.sd3.stored_transformer import StoredTransformer, TransformerConfig
from deployments.sd3.transformer import Transformer
from deployments.sd3.unpacked_weights import unpack_weights_

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel

_BLOCKS = "transformer_blocks."
_LATENT_PIXELS = 8  # pixels a side of a latent


class Mmdit:
    """A loaded transformer on its device.

    Args:
        model: Loaded in `precision`, in eval mode; its weights are taken over.
        device: Where it is.
        precision: What it was loaded in.
        optimizations: What is switched on.

    Raises:
        ConfigurationError: Unknown attention.
    """

    def __init__(
        self,
        model: StoredTransformer,
        device: torch.device,
        precision: PrecisionChoice,
        optimizations: Optimizations = Optimizations(),  # noqa: B008 - frozen
    ) -> None:
        self.device = device
        self.precision = precision
        self.in_channels = model.config.in_channels
        self.joint_attention_dim = model.config.joint_attention_dim
        self.pooled_projection_dim = model.config.pooled_projection_dim
        self.largest_side = model.pos_embed.side * model.config.patch_size  # of latents
        self._heads = model.config.num_attention_heads
        self._head_width = model.config.attention_head_dim
        self._attention = Attention(optimizations.attention, device, precision.compute_dtype)
        self._transformer = Transformer(model, self._attention, optimizations)
        use_graphs = optimizations.cuda_graphs and device.type == "cuda"
        self._graphs = CudaGraphs(self._forward) if use_graphs else None
        self.loras: LoraArena | None = None
        if device.type == "cpu":
            keep_freed_memory()
            if optimizations.int8_products:
                become_int8_(self._transformer)
            if optimizations.unpacked_weights:
                unpack_weights_(self._transformer, precision.compute_dtype)

    @classmethod
    def load(
        cls,
        model_dir: str | Path,
        device: torch.device | str,
        precision: PrecisionChoice | str,
        optimizations: Optimizations = Optimizations(),  # noqa: B008 - frozen
    ) -> Mmdit:
        """Load `MODEL/transformer`; with FP8 precision every Linear of the blocks is FP8.

        Args:
            model_dir: In Diffusers layout.
            device: Where to put it.
            precision: A choice, or what `choose_precision` takes.
            optimizations: What is switched on.

        Raises:
            ConfigurationError: The files do not fit the configuration, or the precision the device.
        """
        device = torch.device(device)
        precision = as_choice(precision, device, Path(model_dir) / "transformer")
        model = load_transformer(model_dir, device, precision)
        return cls(model, device, precision, optimizations)

    @classmethod
    def from_diffusers(
        cls,
        model: SD3Transformer2DModel,
        device: torch.device | str,
        precision: PrecisionChoice | str,
        optimizations: Optimizations = Optimizations(),  # noqa: B008 - frozen
    ) -> Mmdit:
        """Take over a model in memory; with FP8 precision its blocks are quantised one by one.

        Args:
            model: On `device` already; it is empty afterwards.
            device: Where it is.
            precision: A choice, or what `choose_precision` takes.
            optimizations: What is switched on.
        """
        device = torch.device(device)
        precision = as_choice(precision, device)
        stored = StoredTransformer.taking_over(model).eval().requires_grad_(False)
        if precision.weights == "fp8":
            quantize_linears(stored.transformer_blocks, precision.fp8_arithmetic)
        stored.to(precision.compute_dtype)
        return cls(stored, device, precision, optimizations)

    @property
    def resident_bytes(self) -> int:
        """Memory of the weights."""
        return resident_bytes(self._transformer)

    def lora_page_bytes(self) -> int:
        """Return what one page of LoRAs would take."""
        return LoraArena.page_bytes(self._transformer.adaptable(), self.precision.compute_dtype)

    def make_room_for_loras(self, pages: int) -> LoraArena:
        """Take memory for LoRAs; forwards prepared from now on are prepared with them as well.

        Args:
            pages: Of 16 ranks each.
        """
        adaptable = self._transformer.adaptable()
        dtype = self.precision.compute_dtype
        self.loras = LoraArena(adaptable, pages, self.device, dtype)
        self._transformer.attach(self.loras.branches)
        return self.loras

    def prepare(self, height: int, width: int, text_tokens: int, rows: int) -> None:
        """Make forwards of one shape as fast as they get, before any is needed.

        On CUDA this compiles kernels, measures attention and captures a graph; on a CPU it does
        nothing.

        Args:
            height: Of the latents.
            width: Of the latents.
            text_tokens: Tokens of the prompt's embedding.
            rows: Of the batch.
        """
        if self.device.type != "cuda":
            return
        image_tokens = height * width // self._transformer.patch**2
        counts = [image_tokens + text_tokens]
        if self._transformer.attends_again:
            counts.append(image_tokens)
        for tokens in counts:
            self._attention.measure(rows, tokens, self._heads, self._head_width)
        inputs = self._random_inputs(height, width, text_tokens, rows)
        adapted: list[tuple[Tensor, ...]] = [()]
        if self.loras:
            adapted.append(RowLoras.of([()] * rows, self.loras.most_a_row, self.device).tensors)
        for loras in adapted:
            if self._graphs:
                self._graphs.capture(*inputs, *loras)
            else:
                self._forward(*inputs, *loras)
                torch.cuda.synchronize(self.device)

    def path(
        self, height: int, width: int, text_tokens: int, rows: int, adapted: bool = False
    ) -> Literal["graph", "eager"]:
        """Return how `velocity` would compute a shape: by a captured graph or kernel by kernel."""
        shape = (rows, self.in_channels, height, width)
        if self._graphs and self._graphs.has(shape, text_tokens, adapted):
            return "graph"
        return "eager"

    def attention_backend(self, height: int, width: int, text_tokens: int, rows: int) -> str:
        """Return the name of the attention that a shape gets."""
        tokens = height * width // self._transformer.patch**2 + text_tokens
        return self._attention.backend(rows, tokens)

    @torch.inference_mode()
    def velocity(
        self,
        latents: Tensor,
        sigmas: Tensor,
        prompt_embeds: Tensor,
        pooled: Tensor,
        loras: Sequence[Sequence[PageUse]] = (),
    ) -> Tensor:
        """Predict noise - image.

        Args:
            latents: [B, C, h, w], any float dtype.
            sigmas: [B], noise level of each row, 0 to 1.
            prompt_embeds: [B, T, D].
            pooled: [B, P].
            loras: Pages of `make_room_for_loras` that adapt each row; empty where none adapts any,
                which costs nothing.

        Returns:
            float32 [B, C, h, w].
        """
        dtype = self.precision.compute_dtype
        inputs = (
            latents.to(self.device, dtype),
            sigmas.to(self.device, torch.float32, non_blocking=True) * TRAIN_TIMESTEPS,
            prompt_embeds.to(self.device, dtype),
            pooled.to(self.device, dtype),
        )
        rows = None
        if self.loras and any(loras):
            rows = RowLoras.of(loras, self.loras.most_a_row, self.device)
        adapted = rows is not None
        if self._graphs and self._graphs.has(inputs[0].shape, inputs[2].shape[1], adapted):
            return self._graphs.replay(*inputs, *(rows.tensors if rows else ()))
        output: Tensor = self._transformer(*inputs, rows)
        return output.float()

    def _forward(
        self, latents: Tensor, timesteps: Tensor, embeds: Tensor, pooled: Tensor, *loras: Tensor
    ) -> Tensor:
        rows = RowLoras(loras[0], loras[1], loras[2], uses=None) if loras else None
        output: Tensor = self._transformer(latents, timesteps, embeds, pooled, rows)
        return output

    def _random_inputs(
        self, height: int, width: int, text_tokens: int, rows: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=self.device).to(self.precision.compute_dtype)

        return (
            random(rows, self.in_channels, height, width),
            torch.linspace(1.0, float(TRAIN_TIMESTEPS), rows, device=self.device),
            random(rows, text_tokens, self.joint_attention_dim),
            random(rows, self.pooled_projection_dim),
        )


def load_transformer(
    model_dir: str | Path, device: torch.device, precision: PrecisionChoice
) -> StoredTransformer:
    """Load `MODEL/transformer` as its files name it; `Mmdit` takes it over.

    Args:
        model_dir: In Diffusers layout.
        device: Where to put it.
        precision: With FP8 weights every Linear of the blocks is an `Fp8Linear`.

    Raises:
        ConfigurationError: The files do not fit the configuration.
    """
    folder = Path(model_dir) / "transformer"
    config = read_json(folder / "config.json")

    def build() -> StoredTransformer:
        with torch.device("meta"):
            return StoredTransformer(TransformerConfig.of(config))

    model = load_component(folder, build, device, precision, _BLOCKS, _modulation)
    side = _largest_side(Path(model_dir)) // (_LATENT_PIXELS * model.config.patch_size)
    if side > model.pos_embed.side:
        own = int(config["sample_size"]) // model.config.patch_size
        model.pos_embed.widen(side, own / model.pos_embed.side)
    return model


def _largest_side(model_dir: Path) -> int:
    """Return the pixels a side that the folder lets requests ask for; 0: its table's end."""
    file = model_dir / "kelvin.json"
    largest = read_json(file).get("largest_side", 0) if file.is_file() else 0
    return largest if isinstance(largest, int) else 0


def _modulation(model: StoredTransformer) -> list[str]:
    """Name the layers that `Modulation` stacks, in its order."""
    return [
        f"{_BLOCKS}{index}.{norm}.linear"
        for index in range(len(model.transformer_blocks))
        for norm in ("norm1", "norm1_context")
    ]
