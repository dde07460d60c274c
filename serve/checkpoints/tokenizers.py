"""Where the tokenizers are that single files lack.

A tokenizer belongs to a model whose table of embeddings has a row for each of its tokens, so each
candidate's vocabulary is counted before it is taken.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from serve.checkpoints.key_names import Kind
from serve.checkpoints.tensor_files import read_json
from serve.errors import ConfigurationError

FOLDERS: Mapping[Kind, str] = {
    "clip_l": "tokenizer",
    "clip_g": "tokenizer_2",
    "t5": "tokenizer_3",
}
_UNUSED_ROWS = 128  # T5 XXL's table has 32128 rows for 32100 tokens
_REPOSITORIES = (
    "stable-diffusion-3.5-large",
    "stable-diffusion-3.5-large-turbo",
    "stable-diffusion-3.5-medium",
    "stable-diffusion-3-medium-diffusers",
)
TO_GET = (
    "tokenizer/, tokenizer_2/ and tokenizer_3/ (8 MB) of stabilityai/stable-diffusion-3.5-large:"
    " `hf download stabilityai/stable-diffusion-3.5-large --include 'tokenizer*/*'`, or any folder"
    " that holds them, as model.tokenizers"
)


def find_tokenizers(
    encoders: Mapping[Kind, Mapping[str, Any]], stated: Path | None, models_dir: Path | None
) -> dict[Kind, Path]:
    """Return each encoder's tokenizer folder.

    Args:
        encoders: Kind -> configuration, with `vocab_size`.
        stated: The only place to look, if given.
        models_dir: Looked in first otherwise; then Hugging Face's cache; then the built-in model's.

    Raises:
        ConfigurationError: None fits; names what to get and how.
    """
    roots = [stated] if stated is not None else list(_roots(models_dir))
    found: dict[Kind, Path] = {}
    for root in roots:
        # All of one model: the two CLIPs' differ in nothing but how they pad.
        fitting = {
            kind: root / FOLDERS[kind]
            for kind, config in encoders.items()
            if _fits(root / FOLDERS[kind], kind, int(config["vocab_size"]))
        }
        if len(fitting) == len(encoders):
            return fitting
        found = {**fitting, **found}
    if len(found) == len(encoders):
        return found
    lacking = [FOLDERS[kind] for kind in encoders if kind not in found]
    places = ", ".join(str(root) for root in roots[:4]) or "nowhere to look"
    raise ConfigurationError(
        f"No {lacking[0]} for the model's text encoders was found ({places}).",
        field="model.tokenizers",
        value=None if stated is None else str(stated),
        allowed=TO_GET,
    )


def _roots(models_dir: Path | None) -> Iterator[Path]:
    if models_dir is not None:
        for folder in ("tokenizers", "text_encoders", "clip", "."):
            yield models_dir / folder
    hub = os.environ.get("HF_HUB_CACHE") or Path(
        os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface", "hub"
    )
    for name in _REPOSITORIES:
        yield from sorted(Path(hub, f"models--stabilityai--{name}", "snapshots").glob("*"))
    from deployments import builtin

    yield Path(builtin.__path__[0]) / "weights"


def _fits(folder: Path, kind: Kind, rows: int) -> bool:
    if not (folder / "tokenizer_config.json").is_file():
        return False
    tokens = _vocabulary(folder)
    if tokens is None:
        return (folder / "spiece.model").is_file() and kind == "t5"
    return tokens <= rows <= tokens + (_UNUSED_ROWS if kind == "t5" else 0)


def _vocabulary(folder: Path) -> int | None:
    """Return how many tokens a tokenizer knows, None where only its binary form says."""
    try:
        if (folder / "tokenizer.json").is_file():
            whole = read_json(folder / "tokenizer.json")
            added = {token["id"] for token in whole.get("added_tokens", ())}
            vocabulary = whole["model"]["vocab"]
            ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
            return len(added.union(ids))
        if (folder / "vocab.json").is_file():
            return len(read_json(folder / "vocab.json"))
    except (ConfigurationError, KeyError, TypeError):
        return 0
    return None
