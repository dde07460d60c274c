"""Where a model's folder is on this node.

`pico` has no folder in the repository: it is written on the first use of a node, whole or not at
all, and found again by the hash of the code that writes it.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from serve.config import ModelSettings
from serve.errors import ConfigurationError


def resolve_model_dir(settings: ModelSettings) -> Path:
    """Return the folder of the model that the settings name.

    Raises:
        ConfigurationError: There is no such folder on this node.
    """
    if settings.path == "pico":
        return _pico()
    if settings.path == "builtin":
        from deployments import builtin

        path = Path(builtin.__path__[0]) / "weights"
    else:
        path = Path(settings.path).expanduser()
    if not path.is_dir():
        raise ConfigurationError(
            "The model folder does not exist on this node.",
            field="model.path",
            value=str(path),
            allowed="builtin, pico, or a folder in Diffusers layout readable on every node",
        )
    return path


def model_name(settings: ModelSettings) -> str | None:
    """Return the name callers use, or None where the folder says it itself."""
    if settings.name is None and settings.path in ("builtin", "pico"):
        return f"kelvin-{settings.path}"
    return settings.name


def _pico() -> Path:
    from deployments import builtin

    code = sorted(Path(builtin.__path__[0]).glob("*.py"))
    version = hashlib.sha256(b"".join(file.read_bytes() for file in code)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kelvin"
    target = cache / f"pico-{version}"
    if target.is_dir():
        return target

    # Imported here: writing weights needs torch, which what only reads settings must not load.
    from deployments.builtin.pico import write_pico

    cache.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix="pico-", suffix=".tmp", dir=cache))
    try:
        write_pico(written, seed=0)
        written.rename(target)
    except OSError:
        # Another process of this node was first; any other reason leaves no target.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return target
