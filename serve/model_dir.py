"""Where a model's folder is on this node.

Every stage reads a folder in Diffusers layout. What lies in an S3 store is copied to this node's
disk first (`serve.model_cache`). For a single file, and where the settings change a
folder's defaults, that is one which holds everything but the weights and says where they lie
(`serve.checkpoints.view`). `pico` has no folder in the repository: it is written on the first use
of a node, whole or not at all, and found again by the hash of the code that writes it.
"""

import functools
import hashlib
from pathlib import Path

from serve.checkpoints.folders import models_dir_of
from serve.checkpoints.key_names import DIFFUSERS
from serve.checkpoints.model_files import ModelFiles, find_model, is_single_file, read_directory
from serve.checkpoints.stated_config import read_config
from serve.checkpoints.view import write_view
from serve.config import ModelSettings
from serve.errors import ConfigurationError
from serve.model_cache.description import described_on_this_node
from serve.model_cache.node_copy import on_this_node
from serve.user_cache import user_cache
from serve.whole_folder import written_whole

_MOST_NAMED = 10
# A process stays with the version of a model that it has seen first.
_here = functools.lru_cache(maxsize=64)(on_this_node)
_described = functools.lru_cache(maxsize=64)(described_on_this_node)


def resolve_model_dir(settings: ModelSettings, *, weights: bool = True) -> Path:
    """Return the folder of the model that the settings name.

    Args:
        settings: Of the model.
        weights: Whether they are needed; else those of a model from S3 stay there, and files of
            weights have a header only.

    Raises:
        ConfigurationError: There is no such model on this node, or its files are not what they
            should be.
    """
    settings = _local(settings, weights)
    if is_single_file(settings):
        return write_view(find_model(settings), settings)
    path = _directory(settings)
    if not path.is_dir():
        raise ConfigurationError(
            "The model folder does not exist on this node.",
            field="model.path",
            value=str(path),
            allowed="builtin, pico, a folder in Diffusers layout or a .safetensors file, both"
            " readable on every node or at s3://BUCKET/...; with model.models_dir the name of a"
            " checkpoint in it",
        )
    if not (path / "model_index.json").is_file():
        files = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))[:_MOST_NAMED])
        raise ConfigurationError(
            f"{path} is no folder in Diffusers layout: it has no model_index.json.",
            field="model.path",
            value=str(path),
            allowed=f"a file in it by its own path: {files}"
            if files
            else "a folder in Diffusers layout or a .safetensors file",
        )
    for kind, name in DIFFUSERS.items():
        if (path / name / "config.json").is_file():
            read_config(path / name, kind)
    if settings.variant or settings.request_defaults:
        return write_view(read_directory(path, settings), settings, path)
    return path


def model_files(settings: ModelSettings, *, weights: bool = True) -> ModelFiles:
    """Return what the files of the model are that the settings name, read from their headers.

    Args:
        settings: Of the model.
        weights: As of `resolve_model_dir`.

    Raises:
        ConfigurationError: As `resolve_model_dir`.
    """
    settings = _local(settings, weights)
    if is_single_file(settings):
        return find_model(settings)
    return read_directory(_directory(settings), settings)


def lora_roots(settings: ModelSettings, *, weights: bool = True) -> list[Path]:
    """Return the folders of this node whose `loras` hold LoRAs of the model, in order.

    Args:
        settings: Of the model.
        weights: As of `resolve_model_dir`; LoRAs are whole either way.
    """
    roots: list[Path] = []
    settings = _local(settings, weights)
    if not is_single_file(settings):
        roots.append(_directory(settings))
    elif (own := models_dir_of(Path(settings.path).expanduser())) is not None:
        roots.append(own)
    if settings.models_dir is not None:
        roots.append(Path(settings.models_dir).expanduser())
    return roots


def _local(settings: ModelSettings, weights: bool) -> ModelSettings:
    return _here(settings) if weights else _described(settings)


def _directory(settings: ModelSettings) -> Path:
    if settings.path == "pico":
        return _pico()
    if settings.path == "builtin":
        from deployments import builtin

        return Path(builtin.__path__[0]) / "weights"
    return Path(settings.path).expanduser()


def model_name(settings: ModelSettings) -> str | None:
    """Return the name callers use, or None where the folder says it itself."""
    if settings.name is None and settings.path in ("builtin", "pico"):
        return f"kelvin-{settings.path}"
    return settings.name


def _pico() -> Path:
    from deployments import builtin

    code = sorted(Path(builtin.__path__[0]).glob("*.py"))
    version = hashlib.sha256(b"".join(file.read_bytes() for file in code)).hexdigest()[:16]
    target = user_cache() / f"pico-{version}"
    if target.is_dir():
        return target

    # Imported here: writing weights needs torch, which what only reads settings must not load.
    from deployments.builtin.pico import write_pico

    with written_whole(target) as folder:
        write_pico(folder, seed=0)
    return target
