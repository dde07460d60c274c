"""Whether two models have the same text encoders or the same VAE, whatever files hold them.

Large, Turbo and Medium come each with a copy of the same encoders and VAE. Two parts are taken for
the same if their configurations, their tensors' names, types and shapes, and both ends of every
tensor's bytes are equal: some megabytes to read, where whole files would be ten gigabytes. Training
changes every tensor, so models that differ do not pass for the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.pool_state import Stage
from serve.checkpoints.part import Part
from serve.checkpoints.reference import part_in
from serve.checkpoints.tensor_files import read_json
from serve.checkpoints.tokenizers import FOLDERS
from serve.errors import ConfigurationError

_END_BYTES = 4096
_LARGEST_TOKENIZER_FILE = 16 << 20
_FOLDERS: Mapping[Stage, tuple[str, ...]] = {
    "text": ("text_encoder", "text_encoder_2", "text_encoder_3"),
    "decode": ("vae",),
}
# What tools note in a configuration and nothing computes with.
_NOTES = ("architectures", "torch_dtype", "dtype", "transformers_version")


def fingerprint(model_dir: Path, stage: Stage) -> str:
    """Return a hash that is equal for equal work of a stage.

    Args:
        model_dir: In Diffusers layout, or a view that stands for one.
        stage: `text` or `decode`; denoisers are what models differ in.

    Raises:
        ConfigurationError: Files cannot be read.
    """
    digest = hashlib.sha256()
    for piece in _pieces(model_dir, stage):
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.hexdigest()


def _pieces(model_dir: Path, stage: Stage) -> Iterator[bytes]:
    if stage == "text":
        # Without T5 its tokens are zeros of the transformer's width.
        transformer = read_json(model_dir / "transformer" / "config.json")
        yield _json(transformer.get("joint_attention_dim"))
        for name in FOLDERS.values():
            for file in sorted((model_dir / name).glob("*")):
                if file.is_file() and file.stat().st_size <= _LARGEST_TOKENIZER_FILE:
                    yield f"{name}/{file.name}".encode()
                    yield file.read_bytes()
    for name in _FOLDERS[stage]:
        folder = model_dir / name
        yield name.encode()
        if (folder / "config.json").is_file():
            yield _json(_without_notes(read_json(folder / "config.json")))
            yield from _ends(part_in(folder))


def _ends(part: Part) -> Iterator[bytes]:
    yield _json(sorted(part.notes.full_precision))
    for name, source in sorted(part.sources.items()):
        yield _json([name, source.dtype, source.shape, source.part, source.swapped])
        if source.stored is None:
            continue
        tensor, path = part.files.tensors[source.stored], part.files.file_of[source.stored]
        try:
            with path.open("rb") as stream:
                stream.seek(tensor.begin)
                yield stream.read(min(_END_BYTES, tensor.end - tensor.begin))
                stream.seek(max(tensor.begin, tensor.end - _END_BYTES))
                yield stream.read(min(_END_BYTES, tensor.end - tensor.begin))
        except OSError as error:
            raise ConfigurationError(
                f"Cannot read {path}: {error}", field="model.path", value=str(path)
            ) from None


def _without_notes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and name not in _NOTES
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
