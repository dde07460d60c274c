"""Prompts to token ids, saying what did not fit."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from serve.checkpoints.stated_config import class_in
from serve.errors import ConfigurationError

_LONGEST_QUOTE = 120


class PromptTokenizer:
    """One encoder's tokenizer.

    Args:
        tokenizer: Of transformers.
        encoder: Name for warnings, e.g. `CLIP-L`.
    """

    def __init__(self, tokenizer: Any, encoder: str) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder

    @classmethod
    def load(cls, root: Path, folder: str, encoder: str) -> PromptTokenizer:
        """Load `root/folder` with the class that `model_index.json` names.

        Raises:
            ConfigurationError: No such class, or its files cannot be read.
        """
        class_name = class_in(root / "model_index.json", folder)
        tokenizer_class: Any = getattr(transformers, str(class_name), None)
        if not _is_tokenizer(tokenizer_class):
            raise ConfigurationError(
                f"{root / 'model_index.json'} names no tokenizer class for {folder!r}.",
                field="model.path",
                value=str(class_name),
                allowed="a tokenizer class of transformers",
            )
        try:
            tokenizer = tokenizer_class.from_pretrained(root / folder, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigurationError(
                f"Cannot load the tokenizer in {root / folder}: {error}",
                field="model.path",
                value=str(root / folder),
            ) from None
        return cls(tokenizer, encoder)

    @property
    def longest(self) -> int:
        """Tokens its encoder takes, special ones included."""
        return int(self.tokenizer.model_max_length)

    def encode(
        self, prompts: Sequence[str], length: int
    ) -> tuple[Tensor, list[str | None], list[int]]:
        """Tokenise, pad and cut to a length.

        Args:
            prompts: Texts.
            length: Tokens, special ones included.

        Returns:
            int64 [prompts, length]; for each prompt a warning if it was cut, else None; and its
            tokens, as many as the encoder sees, special ones included.
        """
        ids = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        whole = self.tokenizer(list(prompts), verbose=False).input_ids
        warnings = [self._warning(tokens, length) for tokens in whole]
        return ids.to(torch.int64), warnings, [min(len(tokens), length) for tokens in whole]

    def _warning(self, tokens: Sequence[int], length: int) -> str | None:
        if len(tokens) <= length:
            return None
        # The last token is the end mark, which the cut text keeps.
        lost = self.tokenizer.decode(tokens[length - 1 : -1]).strip()
        quote = lost if len(lost) <= _LONGEST_QUOTE else lost[:_LONGEST_QUOTE] + "…"
        return (
            f"{self.encoder} takes {length} tokens and the prompt has {len(tokens)}; "
            f"it did not see: {quote}"
        )


def _is_tokenizer(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, transformers.PreTrainedTokenizerBase)
