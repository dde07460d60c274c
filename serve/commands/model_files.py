"""Whether a model folder is whole and readable, what precision it is stored in, its licence.

Only safetensors headers are read, so a 16 GB checkpoint is looked at in milliseconds.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from serve.commands.finding import Finding
from serve.config import ModelSettings
from serve.errors import KelvinError

_LONGEST_HEADER = 100 << 20  # the safetensors format's own limit


def check_model(settings: ModelSettings) -> list[Finding]:
    """Report whether the model can be read, and under what licence its weights come."""
    from serve.model_dir import model_name, resolve_model_dir
    from serve.models import ModelSpec

    try:
        folder = resolve_model_dir(settings)
        spec = ModelSpec.from_directory(folder, model_name(settings))
        stored = weights_of(folder)
    except KelvinError as error:
        return [Finding("model", "failed", error.message, error.allowed or "see model.path")]
    except OSError as error:
        return [
            Finding("model", "failed", f"{error.filename}: {error.strerror}", "check model.path")
        ]
    except ValueError as error:
        return [Finding("model", "failed", str(error), "fetch the model again: a file is damaged")]
    if not stored.files:
        return [
            Finding(
                "model",
                "failed",
                f"{folder} holds no .safetensors files",
                "give a folder in Diffusers layout with safetensors weights",
            )
        ]
    return [
        Finding("model", "ok", f"{spec.name} at {folder}: {stored.words()}"),
        _licence(settings, spec.licence),
    ]


class Weights:
    """The safetensors files of a folder: how many, how large, and bytes by stored type."""

    def __init__(self) -> None:
        self.files = 0
        self.size_bytes = 0
        self.bytes_by_type: Counter[str] = Counter()

    def words(self) -> str:
        """Return the findings in words."""
        types = ", ".join(
            f"{dtype} {100 * size / max(1, self.bytes_by_type.total()):.0f} %"
            for dtype, size in self.bytes_by_type.most_common(3)
        )
        is_fp8 = any(dtype.startswith("F8_") for dtype in self.bytes_by_type)
        return (
            f"{self.files} weight files, {self.size_bytes / 1e6:,.0f} MB ({types}); "
            f"{'stored in FP8' if is_fp8 else 'not stored in FP8'}"
        )


def weights_of(folder: Path) -> Weights:
    """Read the headers of every safetensors file beneath a folder.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is no safetensors file, is cut short, or an index names a missing one.
    """
    weights = Weights()
    for file in sorted(folder.rglob("*.safetensors")):
        size = file.stat().st_size
        header = _header(file, size)
        weights.files += 1
        weights.size_bytes += size
        for name, tensor in header.items():
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                weights.bytes_by_type[tensor["dtype"]] += end - start
    for index in sorted(folder.rglob("*.safetensors.index.json")):
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(name for name in named if not (index.parent / name).is_file()):
            raise ValueError(f"{index.name} names files that are missing: {', '.join(missing)}")
    return weights


def _header(file: Path, size: int) -> dict[str, Any]:
    # 8 bytes little-endian length, then JSON: https://huggingface.co/docs/safetensors
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(_LONGEST_HEADER, size - 8):
            raise ValueError(f"{file} is not a safetensors file, or is cut short")
        header: dict[str, Any] = json.loads(stream.read(length))
    end = max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)
    if size < 8 + length + end:
        raise ValueError(f"{file} is cut short: {size} of {8 + length + end} bytes")
    return header


def _licence(settings: ModelSettings, stated: str) -> Finding:
    from serve.models import STABILITY_LICENCE, UNKNOWN_LICENCE

    if stated != UNKNOWN_LICENCE:
        return Finding("licence", "ok", stated)
    if settings.path in ("builtin", "pico"):
        return Finding("licence", "ok", "Apache-2.0, part of Kelvin")
    return Finding("licence", "warning", stated, f"for SD3.5's own weights: {STABILITY_LICENCE}")
