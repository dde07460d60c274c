"""SD3's three text encoders, wired as diffusers' `StableDiffusion3Pipeline.encode_prompt`.

Two CLIPs (second to last hidden states side by side, zero-padded to T5's width, pooled projections
concatenated) and T5, one after the other along the tokens; no attention masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch.nn import functional as F

from deployments.payloads import Array, LoraUse, TextJob
from deployments.sd3.checkpoint import load_component, resident_bytes
from deployments.sd3.precision import PrecisionChoice, as_choice
from deployments.sd3.stored_tensors import read_json
from deployments.sd3.stored_transformer import TransformerConfig
from deployments.sd3.text_loras import TextLoras
from deployments.sd3.tokens import PromptTokenizer
from deployments.sd3.wire import to_wire
from serve.checkpoints.key_names import Kind
from serve.checkpoints.lora_file import LoraFile
from serve.checkpoints.stated_config import class_in
from serve.errors import InvalidRequest

_NO_T5 = "T5 is not loaded: CLIP alone read the prompt, which it follows less closely"


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as the transformer takes it, ready to travel (`deployments.sd3.wire`)."""

    prompt_embeds: Array  # [tokens, joint_attention_dim]
    pooled_prompt_embeds: Array  # [pooled_projection_dim]
    warnings: tuple[str, ...]  # what was cut off, by which encoder
    tokens: int = 0  # as T5 counts them, CLIP-G where there is no T5; special ones included


class TextEncoders:
    """The two CLIPs and T5 with their tokenizers.

    Args:
        clips: CLIP-L and CLIP-G, with their tokenizers.
        t5: T5 and its tokenizer, or None: its tokens are then zeros.
        joint_attention_dim: Width of the embeddings that the transformer takes.
        device: Where the models are.
        precision: What they were loaded in.
    """

    def __init__(
        self,
        clips: Sequence[tuple[Any, PromptTokenizer]],
        t5: tuple[Any, PromptTokenizer] | None,
        joint_attention_dim: int,
        device: torch.device,
        precision: PrecisionChoice,
    ) -> None:
        self.clips = tuple(clips)
        self.t5 = t5
        self.joint_attention_dim = joint_attention_dim
        self.device = device
        self.precision = precision
        self._loras: TextLoras | None = None
        # SD3 cuts both CLIPs at the first one's length.
        self.clip_length = self.clips[0][1].longest
        # On a CPU a row alone is as fast as a row among many, and its bits then do not depend on
        # what else was being encoded.
        self.rows_per_forward = 1 if device.type == "cpu" else 64

    @classmethod
    def load(
        cls, model_dir: str | Path, device: torch.device | str, precision: PrecisionChoice | str
    ) -> TextEncoders:
        """Load `MODEL/text_encoder{,_2,_3}` and `MODEL/tokenizer{,_2,_3}`.

        T5's blocks are FP8 if the precision says so; the CLIPs keep what their files hold.

        Args:
            model_dir: In Diffusers layout.
            device: Where to put it.
            precision: A choice, or what `choose_precision` takes.

        Raises:
            ConfigurationError: The files do not fit the configuration, or the precision the device.
        """
        root, device = Path(model_dir), torch.device(device)
        precision = as_choice(precision, device).without_int8()
        clips = [
            (
                _load(root / f"text_encoder{suffix}", "CLIP", device, precision),
                PromptTokenizer.load(root, f"tokenizer{suffix}", name),
            )
            for suffix, name in (("", "CLIP-L"), ("_2", "CLIP-G"))
        ]
        t5 = None
        if class_in(root / "model_index.json", "text_encoder_3") is not None:
            model = _load(root / "text_encoder_3", "T5", device, precision)
            t5 = (model, PromptTokenizer.load(root, "tokenizer_3", "T5"))
        transformer = TransformerConfig.of(read_json(root / "transformer" / "config.json"))
        return cls(clips, t5, transformer.joint_attention_dim, device, precision)

    @property
    def resident_bytes(self) -> int:
        """Memory of the weights."""
        models = [model for model, _ in self.clips] + ([self.t5[0]] if self.t5 else [])
        return sum(resident_bytes(model) for model in models)

    def take_loras(self, find: Callable[[str], LoraFile]) -> None:
        """Let prompts name LoRAs.

        Args:
            find: Returns the file of a name.
        """
        kinds: tuple[Kind, ...] = ("clip_l", "clip_g")
        models: dict[Kind, Any] = {
            kind: model for kind, (model, _) in zip(kinds, self.clips, strict=True)
        }
        if self.t5 is not None:
            models["t5"] = self.t5[0]
        self._loras = TextLoras(models, find, self.device, self.precision.compute_dtype)

    def _adapted(self, uses: Sequence[LoraUse]) -> AbstractContextManager[None]:
        if not uses:
            return nullcontext()
        if self._loras is None:
            raise InvalidRequest(
                "This text encoder takes no LoRAs.",
                field="loras",
                value=", ".join(use.name for use in uses),
                allowed="none",
            )
        return self._loras.beside(uses)

    def encode(self, jobs: Sequence[TextJob]) -> list[EncodedPrompt]:
        """Encode prompts, in order; those of equal T5 length and LoRAs share forwards on a GPU.

        Texts longer than an encoder takes are cut, with a warning that says what was lost.

        Raises:
            InvalidRequest: A LoRA cannot be used.
        """
        encoded: dict[int, EncodedPrompt] = {}
        for kind in dict.fromkeys((job.max_sequence_length, job.loras) for job in jobs):
            group = [
                at for at, job in enumerate(jobs) if (job.max_sequence_length, job.loras) == kind
            ]
            length, loras = kind
            for begin in range(0, len(group), self.rows_per_forward):
                rows = group[begin : begin + self.rows_per_forward]
                with self._adapted(loras):
                    results = self._encode_rows([jobs[at] for at in rows], length)
                encoded.update(zip(rows, results, strict=True))
        return [encoded[at] for at in range(len(jobs))]

    @torch.inference_mode()
    def _encode_rows(self, jobs: Sequence[TextJob], t5_length: int) -> list[EncodedPrompt]:
        warnings: list[list[str]] = [[] for _ in jobs]
        hidden, pooled = [], []
        texts = ([job.prompt for job in jobs], [job.prompt_2 for job in jobs])
        for (model, tokenizer), prompts in zip(self.clips, texts, strict=True):
            ids, cut, tokens = tokenizer.encode(prompts, self.clip_length)
            output = model(ids.to(self.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
            _collect(warnings, cut)
        clip = torch.cat(hidden, dim=-1)
        if self.t5 is None:
            shape = (len(jobs), t5_length, self.joint_attention_dim)
            t5 = torch.zeros(shape, dtype=clip.dtype, device=clip.device)
            _collect(warnings, [_NO_T5 if job.prompt_3 else None for job in jobs])
        else:
            model, tokenizer = self.t5
            ids, cut, tokens = tokenizer.encode([job.prompt_3 for job in jobs], t5_length)
            t5 = model(ids.to(self.device))[0]
            _collect(warnings, cut)
        clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        dtype = self.precision.compute_dtype
        # [B, clip tokens + T5 tokens, D] and [B, P]
        prompt_embeds = torch.cat([clip, t5], dim=-2).to("cpu", dtype)
        pooled_embeds = torch.cat(pooled, dim=-1).to("cpu", dtype)
        return [
            EncodedPrompt(
                to_wire(prompt_embeds[row]), to_wire(pooled_embeds[row]), tuple(said), tokens[row]
            )
            for row, said in enumerate(warnings)
        ]


def _collect(warnings: list[list[str]], cut: Sequence[str | None]) -> None:
    for said, warning in zip(warnings, cut, strict=True):
        if warning is not None:
            said.append(warning)


def _load(folder: Path, kind: str, device: torch.device, precision: PrecisionChoice) -> Any:
    config = read_json(folder / "config.json")

    def build() -> Any:
        # Buffers stay real: the classes compute them themselves and files do not hold them.
        with init_empty_weights(include_buffers=False):
            if kind == "CLIP":
                clip_config = transformers.CLIPTextConfig.from_dict(config)
                return transformers.CLIPTextModelWithProjection(clip_config)
            return transformers.T5EncoderModel(transformers.T5Config.from_dict(config))

    return load_component(
        folder, build, device, precision, "encoder.block." if kind == "T5" else None
    )
