"""From prompts to what the transformer reads, wired as ``StableDiffusion3Pipeline`` wires it.

Training and inference must feed the transformer the same thing, so this follows
``StableDiffusion3Pipeline.encode_prompt`` (diffusers 0.42) exactly: the last but one hidden state
of both CLIPs side by side, zero-padded to T5's width, then T5's tokens after them; both CLIPs'
projections side by side as the pooled vector; T5 sees its padding, no attention mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import CLIPTokenizer, T5Tokenizer

from deployments.builtin.architecture import ModelSpec, Parts
from deployments.builtin.grammar_tokenizers import build_clip_tokenizer, build_t5_tokenizer


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Token ids of a batch of prompts.

    Attributes:
        clip: int64 [prompts, clip_length], the same for both CLIPs.
        t5: int64 [prompts, t5_length].
    """

    clip: torch.Tensor
    t5: torch.Tensor


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """The tokenizers of one model and the lengths it pads prompts to."""

    clip: CLIPTokenizer
    t5: T5Tokenizer
    clip_length: int
    t5_length: int

    @classmethod
    def for_spec(cls, spec: ModelSpec) -> "PromptEncoder":
        """Tokenizers of the drawn world's grammar."""
        return cls(
            clip=build_clip_tokenizer(spec.clip_length),
            t5=build_t5_tokenizer(spec.t5_length),
            clip_length=spec.clip_length,
            t5_length=spec.t5_length,
        )

    def tokens(self, prompts: Sequence[str]) -> PromptTokens:
        """Token ids, padded and truncated to the model's lengths, on the CPU."""
        ids = [
            tokenizer(
                list(prompts),
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer, length in ((self.clip, self.clip_length), (self.t5, self.t5_length))
        ]
        return PromptTokens(clip=ids[0], t5=ids[1])


def encode_tokens(
    parts: Parts, clip_ids: torch.Tensor, t5_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the transformer reads.

    Args:
        parts: the text encoders.
        clip_ids: int64 [prompts, clip_length].
        t5_ids: int64 [prompts, t5_length].

    Returns:
        ``prompt_embeds`` [prompts, clip_length + t5_length, t5_width] and
        ``pooled_prompt_embeds`` [prompts, sum of clip widths].
    """
    first = parts.text_encoder(clip_ids, output_hidden_states=True)
    second = parts.text_encoder_2(clip_ids, output_hidden_states=True)
    clip_states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    t5_states = parts.text_encoder_3(t5_ids)[0]
    padding = t5_states.shape[-1] - clip_states.shape[-1]
    clip_states = functional.pad(clip_states, (0, padding)).to(t5_states.dtype)
    prompt_embeds = torch.cat([clip_states, t5_states], dim=-2)
    return prompt_embeds, torch.cat([first.text_embeds, second.text_embeds], dim=-1)
