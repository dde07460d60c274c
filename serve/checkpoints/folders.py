"""Where files lie in a ComfyUI `models` folder; what a name may reach ends at that folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from serve.errors import ConfigurationError

CHECKPOINTS = ("checkpoints", "diffusion_models", "unet")
TEXT_ENCODERS = ("text_encoders", "clip")
VAE = ("vae",)
_MOST_FILES = 500


def find_file(models_dir: Path, folders: Sequence[str], name: str, field: str) -> Path:
    """Return a file by its name in one of a models folder's folders.

    Args:
        models_dir: The `models` folder.
        folders: Tried in order.
        name: As ComfyUI shows it: relative, perhaps with folders of its own.
        field: The setting it came from.

    Raises:
        ConfigurationError: It is not there, or would leave the folder, by its name or by a link.
    """
    allowed = f"the name of a .safetensors file in {models_dir}/{{{','.join(folders)}}}"
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise ConfigurationError(
            f"{name!r} would leave the models folder.", field=field, value=name, allowed=allowed
        )
    for folder in folders:
        path = models_dir / folder / name
        if path.is_file():
            check_inside(models_dir, path, field)
            return path
    raise ConfigurationError(
        f"There is no {name!r} in {models_dir}.", field=field, value=name, allowed=allowed
    )


def check_inside(models_dir: Path, path: Path, field: str) -> None:
    """Refuse a link that leads out of the models folder.

    Raises:
        ConfigurationError: It does.
    """
    real = path.resolve()
    if not real.is_relative_to(models_dir.resolve()):
        raise ConfigurationError(
            f"{path} is a link out of the models folder, to {real}.",
            field=field,
            value=str(path),
            allowed="a file inside it; or give the folder that the link leads to as models_dir",
        )


def candidates(models_dir: Path, folders: Sequence[str]) -> Iterator[Path]:
    """Yield the safetensors files of some folders; links that lead out are left out."""
    for path, is_inside in _files(models_dir, folders):
        if is_inside:
            yield path


def links_out(models_dir: Path, folders: Sequence[str]) -> list[Path]:
    """Return the safetensors files of some folders that are left out, as links that lead out."""
    return [path for path, is_inside in _files(models_dir, folders) if not is_inside]


def _files(models_dir: Path, folders: Sequence[str]) -> Iterator[tuple[Path, bool]]:
    """Yield files, and whether each lies in the models folder in truth."""
    real = models_dir.resolve()
    for folder in folders:
        found = sorted((models_dir / folder).rglob("*.safetensors"))
        for path in found[:_MOST_FILES]:
            if path.is_file():
                yield path, path.resolve().is_relative_to(real)


def models_dir_of(checkpoint: Path) -> Path | None:
    """Return the models folder that a checkpoint lies in, if its folder's name says so."""
    for parent in checkpoint.absolute().parents:
        if parent.name in CHECKPOINTS:
            return parent.parent
    return None
