"""The text encoders and the VAE that stand beside a checkpoint which lacks them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.checkpoints.architecture import config_of
from serve.checkpoints.checks import check_part
from serve.checkpoints.families import parts_in, stranger
from serve.checkpoints.folders import TEXT_ENCODERS, VAE, candidates, find_file, links_out
from serve.checkpoints.key_names import Kind
from serve.checkpoints.part import Part
from serve.checkpoints.tensor_files import TensorFiles
from serve.errors import ConfigurationError

TO_GET: Mapping[Kind, str] = {
    "clip_l": "clip_l.safetensors (246 MB)",
    "clip_g": "clip_g.safetensors (1.4 GB)",
    "t5": "t5xxl_fp8_e4m3fn.safetensors (4.9 GB) or t5xxl_fp16.safetensors (9.8 GB)",
    "vae": "diffusion_pytorch_model.safetensors of vae/ (168 MB)",
}
"""The file that brings a part, as its publishers call it."""

_LABELS: Mapping[Kind, str] = {
    "clip_l": "CLIP-L",
    "clip_g": "CLIP-G",
    "t5": "T5",
    "vae": "VAE",
    "transformer": "transformer",
}


@dataclass(frozen=True)
class Found:
    """A part with its configuration, checked against each other."""

    part: Part
    config: Mapping[str, Any]


@dataclass
class Companions:
    """What was found beside a checkpoint.

    Attributes:
        parts: By kind.
        passed_over: Other files that would have done, and why they were not taken.
    """

    parts: dict[Kind, Found] = field(default_factory=dict)
    passed_over: list[str] = field(default_factory=list)


def load_part(files: TensorFiles, prefix: str, kind: Kind) -> Found:
    """Translate a part, read off its configuration and check one against the other.

    Raises:
        ConfigurationError: It is not what it seems; see `check_part`.
    """
    part = Part.of(files, prefix, kind)
    config = config_of(part)
    check_part(part, config)
    return Found(part, config)


def find_companions(
    missing: Iterable[Kind],
    models_dir: Path | None,
    transformer: Mapping[str, Any],
    *,
    prefer_fp8: bool,
    text_encoders: Sequence[str] = (),
    vae: str | None = None,
) -> Companions:
    """Find what a checkpoint lacks.

    Args:
        missing: What it lacks; also what settings name although it has it.
        models_dir: Where to look; None finds nothing.
        transformer: Configuration that the encoders must match.
        prefer_fp8: Of two files that do, whether to take the one in FP8.
        text_encoders: File names that take the place of looking.
        vae: Likewise.

    Raises:
        ConfigurationError: A named file does not fit, or only such were found: with the first one's
            name and what was expected of it.
    """
    found = Companions()
    wanted = set(missing)
    if models_dir is None:
        return found
    chosen = [find_file(models_dir, TEXT_ENCODERS, n, "model.text_encoders") for n in text_encoders]
    for path in chosen:
        _take_named(found, path, transformer, "model.text_encoders")
    if vae is not None:
        _take_named(found, find_file(models_dir, VAE, vae, "model.vae"), transformer, "model.vae")
    wanted -= set(found.parts)
    reasons: dict[Kind, ConfigurationError] = {}
    fitting: dict[Kind, list[Found]] = {}
    folders = () if text_encoders else TEXT_ENCODERS
    for path in (*candidates(models_dir, folders), *candidates(models_dir, VAE)):
        _consider(path, wanted, transformer, fitting, reasons)
    for kind in sorted(wanted):
        options = sorted(fitting.get(kind, ()), key=lambda each: _rank(each.part, prefer_fp8))
        if options:
            found.parts[kind] = options[0]
            found.passed_over += [
                f"{_LABELS[kind]}: {other.part.files.paths[0].name} ({other.part.notes.name})"
                for other in options[1:]
            ]
        elif kind in reasons:
            raise reasons[kind]
    if wanted - set(found.parts):
        found.passed_over += [
            f"{path.name} (a link out of the models folder)"
            for path in (*links_out(models_dir, folders), *links_out(models_dir, VAE))
        ]
    return found


def check_fit(kind: Kind, found: Found, transformer: Mapping[str, Any]) -> None:
    """Check an encoder's width against the transformer that reads it.

    Raises:
        ConfigurationError: They differ; names the file.
    """
    if kind == "t5" and found.config["d_model"] != transformer["joint_attention_dim"]:
        raise ConfigurationError(
            f"{found.part.files.paths[0]} is a T5 of width {found.config['d_model']}; the model"
            f" reads {transformer['joint_attention_dim']}.",
            field="model.text_encoders",
            value=str(found.part.files.paths[0]),
            allowed=f"T5 v1.1 XXL's encoder: {TO_GET['t5']}",
        )


def _take_named(
    found: Companions, path: Path, transformer: Mapping[str, Any], setting: str
) -> None:
    files = TensorFiles.of([path])
    kinds: dict[Kind, str] = {
        kind: prefix
        for kind, prefix in parts_in(files).items()
        if (kind == "vae") == (setting == "model.vae") and kind != "transformer"
    }
    if not kinds:
        raise ConfigurationError(
            f"{path} is {stranger(files) or 'a transformer'}.",
            field=setting,
            value=path.name,
            allowed="a VAE" if setting == "model.vae" else "CLIP-L, CLIP-G or T5 v1.1 XXL",
        )
    for kind, prefix in kinds.items():
        part = load_part(files, prefix, kind)
        check_fit(kind, part, transformer)
        found.parts[kind] = part


def _consider(
    path: Path,
    wanted: set[Kind],
    transformer: Mapping[str, Any],
    fitting: dict[Kind, list[Found]],
    reasons: dict[Kind, ConfigurationError],
) -> None:
    """Sort a file in among those that fit, or keep the reason why it does not."""
    guess: Kind = "vae" if path.parent.name == "vae" else "t5"
    try:
        files = TensorFiles.of([path])
        kinds = parts_in(files)
    except ConfigurationError as error:
        if "t5" in path.name.lower() or guess == "vae":
            reasons.setdefault(guess, error)
        return
    for kind, prefix in kinds.items():
        if kind not in wanted:
            continue
        try:
            part = load_part(files, prefix, kind)
            check_fit(kind, part, transformer)
        except ConfigurationError as error:
            reasons.setdefault(kind, error)
        else:
            fitting.setdefault(kind, []).append(part)


def _rank(part: Part, prefer_fp8: bool) -> tuple[bool, bool, str]:
    is_fp8 = part.notes.name != "not quantised"
    is_cast = part.notes.name == "FP8 by plain cast"
    return is_fp8 != prefer_fp8, is_cast, part.files.paths[0].name
