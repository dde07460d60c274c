"""What a model's files are: whole, of which variant, in which formats, and the cards they fit.

Only headers are read, so 30 GB of files are looked at in seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from serve.commands.finding import Finding
from serve.config import ModelSettings
from serve.errors import KelvinError

_LABELS = {
    "transformer": "transformer",
    "clip_l": "CLIP-L",
    "clip_g": "CLIP-G",
    "t5": "T5",
    "vae": "VAE",
}
_GIB = 1 << 30


def check_model(settings: ModelSettings) -> list[Finding]:
    """Report what the model is, whether it can be read, what it needs, and its licence."""
    try:
        return list(_examined(settings))
    except KelvinError as error:
        return [Finding("model", "failed", error.message, error.allowed or "see model.path")]
    except OSError as error:
        return [
            Finding("model", "failed", f"{error.filename}: {error.strerror}", "check model.path")
        ]


def _examined(settings: ModelSettings) -> Iterator[Finding]:
    from serve.checkpoints.memory import fits
    from serve.checkpoints.model_files import DIRECTORY
    from serve.checkpoints.variants import NAMES
    from serve.model_dir import model_files, model_name, resolve_model_dir
    from serve.models import ModelSpec

    # Of a model in S3 its weights stay there: they come to the nodes that compute with them.
    folder = resolve_model_dir(settings, weights=False)
    model = model_files(settings, weights=False)
    if model.layout == DIRECTORY:
        _check_directory(model.parts)
    spec = ModelSpec.from_directory(folder, model_name(settings))
    what = NAMES[model.variant] if model.variant else "SD3.5's architecture"
    defaults = spec.defaults
    where = str(folder) if settings.path in ("builtin", "pico") else settings.path
    yield Finding(
        "model",
        "ok",
        f"{spec.name} at {where} ({model.layout}): {what} ({model.told_by}); by default"
        f" {defaults.width}x{defaults.height}, {defaults.num_inference_steps} steps, guidance"
        f" {defaults.guidance_scale:g}, {defaults.sampler}, shift {defaults.shift:g}",
        figures={
            "variant": model.variant,
            "layout": model.layout,
            "defaults": defaults.model_dump(),
            "notes": list(model.notes),
        },
    )
    parts = {kind: found.part for kind, found in model.parts.items()}
    for kind, part in parts.items():
        yield _of_part(kind, part)
    for said in model.warnings:
        yield Finding("T5", "warning", said.partition(". ")[0], said)
    for fit in fits(parts):
        yield _of_fit(fit)
    yield _licence(settings, spec.licence)


def _check_directory(parts: Any) -> None:
    """Check a directory's headers against its configurations, where these say enough."""
    from serve.checkpoints.checks import check_part

    for kind, found in parts.items():
        try:
            check_part(replace(found.part, kind=kind), found.config)
        except KeyError:
            continue  # a field that the class has a default for; loading checks all


def _of_part(kind: Any, part: Any) -> Finding:
    from serve.checkpoints.memory import resident_bytes

    by_type: Counter[str] = Counter()
    for source in part.weights.values():
        if source.stored is not None:
            size = 1
            for side in source.shape:
                size *= side
            by_type[source.dtype] += size
    types = ", ".join(
        f"{dtype} {100 * count / max(1, by_type.total()):.0f} %"
        for dtype, count in by_type.most_common(3)
    )
    resident = {weights: resident_bytes(kind, part, weights) for weights in ("fp8", "bf16")}
    names = sorted({path.name for path in part.files.paths})
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    held = f"{_size(resident['bf16'])} in memory as bf16"
    if resident["fp8"] < resident["bf16"]:
        held += f", {_size(resident['fp8'])} as FP8"
    return Finding(
        _LABELS[kind],
        "ok",
        f"{names[0]}{more}: {part.notes.name} ({types}); {_size(part.stored_bytes)} on disk,"
        f" {held}",
        figures={
            "files": [str(path) for path in part.files.paths],
            "format": part.notes.name,
            "parameters_by_dtype": dict(by_type),
            "full_precision_layers": len(part.notes.full_precision),
            "disk_bytes": part.stored_bytes,
            "resident_bytes": resident,
        },
    )


def _of_fit(fit: Any) -> Finding:
    card = fit.card
    told = "; ".join(
        f"{stage} {_size(needed)} in {fit.precision[stage]}"
        + ("" if stage in fit.stages else " does not fit")
        for stage, needed in fit.needs.items()
    )
    whole = "all on one card" if fit.all_fit else "not all on one card"
    return Finding(
        f"on {card.name}",
        "ok" if len(fit.stages) == len(fit.needs) else "warning",
        f"{told}; {whole} ({_size(fit.together)} of {_size(card.usable_bytes)})",
        "" if len(fit.stages) == len(fit.needs) else "place that stage on a larger card",
        figures={
            "needs_bytes": dict(fit.needs),
            "precision": dict(fit.precision),
            "stages": list(fit.stages),
            "all_on_one": fit.all_fit,
        },
    )


def _size(size: float) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / 2**20:.1f} MiB"


def _licence(settings: ModelSettings, stated: str) -> Finding:
    from serve.models import STABILITY_LICENCE, UNKNOWN_LICENCE

    if stated != UNKNOWN_LICENCE:
        return Finding("licence", "ok", stated)
    if settings.path in ("builtin", "pico"):
        return Finding("licence", "ok", "Apache-2.0, part of Kelvin")
    return Finding("licence", "warning", stated, f"for SD3.5's own weights: {STABILITY_LICENCE}")
