"""A model of single files, presented as the Diffusers directory that every stage reads.

The folder holds the configurations, the tokenizers and, in place of weights, a note of where the
weights lie: kilobytes, written once a node, whole or not at all, and found again by its content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve.checkpoints.architecture import hints
from serve.checkpoints.key_names import DIFFUSERS
from serve.checkpoints.model_files import ModelFiles
from serve.checkpoints.reference import REFERENCE, reference_to
from serve.checkpoints.tensor_files import read_json
from serve.checkpoints.tokenizers import FOLDERS
from serve.checkpoints.variants import DEFAULTS
from serve.model_settings import ModelSettings
from serve.user_cache import user_cache
from serve.whole_folder import written_whole

_LARGEST_COPY = 16 << 20
_CLASSES: Mapping[str, tuple[str, str]] = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_3": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "tokenizer_3": ("transformers", "T5Tokenizer"),
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


def write_view(model: ModelFiles, settings: ModelSettings, directory: Path | None = None) -> Path:
    """Return a folder that stands for a model, written if it is not there yet.

    Args:
        model: What its files are.
        settings: Whose defaults of requests win.
        directory: In Diffusers layout, where the model is one: its small files are taken over.

    Raises:
        OSError: The cache folder cannot be written.
    """
    contents = _copied(directory) if directory else _made(model)
    for kind, found in model.parts.items():
        contents[f"{DIFFUSERS[kind]}/{REFERENCE}"] = _json(reference_to(found.part))
    if directory:
        stated = read_json(directory / "kelvin.json") if "kelvin.json" in contents else {}
    else:
        given = hints(model.parts["transformer"].part.files).get("defaults")
        stated = given if isinstance(given, dict) else {}
    contents["kelvin.json"] = _json(kelvin_json(model, settings, stated))
    digest = hashlib.sha256()
    for name, content in sorted(contents.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    target = user_cache() / "models" / f"{_file_name(model.name)}-{digest.hexdigest()[:16]}"
    if not target.is_dir():
        _write(contents, target)
    return target


def _made(model: ModelFiles) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    for kind, found in model.parts.items():
        contents[f"{DIFFUSERS[kind]}/config.json"] = _json(found.config)
    for kind, source in model.tokenizers.items():
        contents |= {f"{FOLDERS[kind]}/{file.name}": file.read_bytes() for file in _small(source)}
    own = hints(model.parts["transformer"].part.files)
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    contents["scheduler/scheduler_config.json"] = _json(scheduler)
    if isinstance(own.get("latent_rgb"), dict):
        contents["latent_rgb.json"] = _json(own["latent_rgb"])
    folders = {DIFFUSERS[kind] for kind in model.parts} | {FOLDERS[k] for k in model.tokenizers}
    index: dict[str, Any] = {"_class_name": "StableDiffusion3Pipeline"}
    for name, classes in _CLASSES.items():
        index[name] = list(classes) if name in folders | {"scheduler"} else [None, None]
    contents["model_index.json"] = _json(index)
    return contents


def _copied(directory: Path) -> dict[str, bytes]:
    folders = [directory, *(directory / name for name in _CLASSES if (directory / name).is_dir())]
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for folder in folders
        for file in _small(folder)
        if not file.name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".png"))
    }


def _small(folder: Path) -> list[Path]:
    files = (file for file in sorted(folder.iterdir()) if file.is_file())
    return [file for file in files if file.stat().st_size <= _LARGEST_COPY]


def kelvin_json(
    model: ModelFiles, settings: ModelSettings, stated: Mapping[str, Any]
) -> dict[str, Any]:
    """Return defaults and limits of requests: by the settings, else the file, else the variant."""
    variant = DEFAULTS[model.variant] if model.variant else {}
    limits = {} if settings.max_size is None else {"largest_side": None}
    return {"name": model.name, **variant, **stated, **limits, **settings.request_defaults}


def _write(contents: Mapping[str, bytes], target: Path) -> None:
    with written_whole(target) as folder:
        for name, content in contents.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _file_name(name: str) -> str:
    return "".join(each if each.isalnum() or each in "-._" else "_" for each in name)[:80]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
