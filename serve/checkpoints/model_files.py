"""All files of one model: a checkpoint and what stands beside it, or a Diffusers directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serve.checkpoints.checks import listed
from serve.checkpoints.companions import TO_GET, Found, find_companions, load_part
from serve.checkpoints.families import parts_in, stranger, unclaimed
from serve.checkpoints.folders import (
    CHECKPOINTS,
    TEXT_ENCODERS,
    VAE,
    find_file,
    links_out,
    models_dir_of,
)
from serve.checkpoints.key_names import DIFFUSERS, Kind
from serve.checkpoints.reference import part_in
from serve.checkpoints.stated_config import class_in, read_config
from serve.checkpoints.tensor_files import TensorFiles
from serve.checkpoints.tokenizers import FOLDERS, find_tokenizers
from serve.checkpoints.variants import variant_of
from serve.errors import ConfigurationError
from serve.model_settings import ModelSettings, Variant

DIRECTORY = "Diffusers directory"
"""The layout of one, in words."""

NO_T5 = (
    "T5 is not loaded: its tokens are zeros, as in ComfyUI; pictures follow long prompts and"
    f" lettering less. For it add {TO_GET['t5']}"
)


@dataclass(frozen=True)
class ModelFiles:
    """What a model's files are.

    Attributes:
        name: Of the checkpoint or directory.
        layout: In words.
        parts: Every part that is there; all but T5 always are.
        variant: Which of SD3.5's it is; None for another size.
        told_by: What told the variant.
        tokenizers: Encoder -> folder.
        metadata: Of the checkpoint.
        warnings: What works, but not as well as it could.
        notes: What else is worth knowing.
    """

    name: str
    layout: str
    parts: Mapping[Kind, Found]
    variant: Variant | None
    told_by: str
    tokenizers: Mapping[Kind, Path]
    metadata: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def is_single_file(settings: ModelSettings) -> bool:
    """Return whether the settings name a file rather than a directory or a built-in model."""
    path = Path(settings.path).expanduser()
    if settings.path in ("builtin", "pico") or path.is_dir():
        return False
    return settings.models_dir is not None or path.suffix != "" or path.is_file()


def find_model(settings: ModelSettings) -> ModelFiles:
    """Find and check the files of a model that is named by its checkpoint.

    Raises:
        ConfigurationError: What is missing, damaged, of another model or does not fit, by file and
            tensor, and the file to get.
    """
    models_dir = None if settings.models_dir is None else Path(settings.models_dir).expanduser()
    checkpoint = _checkpoint(settings, models_dir)
    around = models_dir or models_dir_of(checkpoint)
    files = TensorFiles.of([checkpoint])
    if (what := stranger(files)) is not None:
        raise ConfigurationError(
            f"{checkpoint} is {what}.",
            field="model.path",
            value=str(checkpoint),
            allowed="a checkpoint of Stable Diffusion 3.5 Large, Large Turbo or Medium",
        )
    inside = parts_in(files)
    if extra := unclaimed(files, inside):
        raise ConfigurationError(
            f"{checkpoint} holds {listed(extra)} that belong to no part of the model.",
            field="model.path",
            value=extra[0],
            allowed="a checkpoint of Stable Diffusion 3.5",
        )
    parts = {kind: load_part(files, prefix, kind) for kind, prefix in inside.items()}
    transformer = parts["transformer"]
    fp8 = transformer.part.notes.name != "not quantised"
    beside = find_companions(
        [kind for kind in DIFFUSERS if kind not in parts],
        around,
        transformer.config,
        prefer_fp8=fp8,
        text_encoders=settings.text_encoders,
        vae=settings.vae,
    )
    parts |= beside.parts
    _check_whole(checkpoint, parts, around)
    stated = None if settings.tokenizers is None else Path(settings.tokenizers).expanduser()
    encoders = {kind: parts[kind].config for kind in FOLDERS if kind in parts}
    tokenizers = find_tokenizers(encoders, stated, around)
    metadata = files.headers[0].metadata
    variant, told_by = variant_of(transformer.config, checkpoint.stem, metadata)
    return ModelFiles(
        name=checkpoint.stem,
        layout="single file" if models_dir is None else "ComfyUI's folders",
        parts={kind: parts[kind] for kind in DIFFUSERS if kind in parts},
        variant=settings.variant or variant,
        told_by="model.variant" if settings.variant else told_by,
        tokenizers=tokenizers,
        metadata=metadata,
        warnings=() if "t5" in parts else (NO_T5,),
        notes=tuple(f"not taken: {each}" for each in beside.passed_over),
    )


def read_directory(folder: Path, settings: ModelSettings) -> ModelFiles:
    """Read what a Diffusers directory holds; whether tensors fit is checked when it is loaded.

    Raises:
        ConfigurationError: A file is missing, damaged, or quantised in a way that is not read.
    """
    parts: dict[Kind, Found] = {}
    for kind, name in DIFFUSERS.items():
        if class_in(folder / "model_index.json", name) is None and kind == "t5":
            continue
        config = read_config(folder / name, kind)
        parts[kind] = Found(part_in(folder / name), config)
    variant, told_by = variant_of(parts["transformer"].config, folder.resolve().name)
    return ModelFiles(
        name=folder.resolve().name,
        layout=DIRECTORY,
        parts=parts,
        variant=settings.variant or variant,
        told_by="model.variant" if settings.variant else told_by,
        tokenizers={kind: folder / name for kind, name in FOLDERS.items() if kind in parts},
        warnings=() if "t5" in parts else (NO_T5,),
    )


def _checkpoint(settings: ModelSettings, models_dir: Path | None) -> Path:
    given = Path(settings.path).expanduser()
    if models_dir is not None and not given.is_absolute():
        if not models_dir.is_dir():
            raise ConfigurationError(
                "The models folder does not exist on this node.",
                field="model.models_dir",
                value=str(models_dir),
                allowed="the `models` folder of a ComfyUI installation",
            )
        return find_file(models_dir, CHECKPOINTS, settings.path, "model.path")
    return given


def _check_whole(checkpoint: Path, parts: Mapping[Kind, Found], models_dir: Path | None) -> None:
    for kind in ("clip_l", "clip_g", "vae"):
        if kind not in parts:
            folders = VAE if kind == "vae" else TEXT_ENCODERS
            folder = folders[0]
            where = "its models folder" if models_dir is None else str(models_dir)
            linked = [] if models_dir is None else links_out(models_dir, folders)
            hint = f"; {linked[0]} leads out of it, and is not read" if linked else ""
            raise ConfigurationError(
                f"{checkpoint} has no {kind}, and none that fits is in {where}/{folder}{hint}.",
                field="model.path",
                value=str(checkpoint),
                allowed=f"{TO_GET[kind]} in {folder}"
                + ("; model.models_dir says where that is" if models_dir is None else ""),
            )
    pooled = parts["transformer"].config["pooled_projection_dim"]
    widths = [parts[kind].config["projection_dim"] for kind in ("clip_l", "clip_g")]
    if sum(widths) != pooled:
        paths = ", ".join(str(parts[kind].part.files.paths[0]) for kind in ("clip_l", "clip_g"))
        raise ConfigurationError(
            f"The CLIPs in {paths} are {widths[0]} and {widths[1]} wide; {checkpoint} reads"
            f" {pooled} together.",
            field="model.text_encoders",
            value=str(widths),
            allowed="CLIP-L (768) and CLIP-G (1280) for Stable Diffusion 3.5",
        )
