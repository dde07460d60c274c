"""Settings from the command line: `--set storage.bucket=pictures` and the shorthand options."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from serve.config import PoolSettings, Settings, load_settings
from serve.errors import ConfigurationError

_ALLOWED = "section.name=value, e.g. storage.bucket=pictures; README.md lists every setting"
_STAGES = ("text_encoder", "denoiser", "vae_decoder")


def settings_from_options(
    config: Path | None,
    assignments: Iterable[str] = (),
    *,
    model: str | None = None,
    models_dir: str | None = None,
    host: str | None = None,
    port: int | None = None,
) -> Settings:
    """Return the settings of a file, the environment and the command line; the latter wins.

    Args:
        config: YAML file, or None.
        assignments: Each `a.b=value`; the value is read as YAML, so `2` is a number.
            `denoiser.num_replicas=2` reaches into the stage's only pool.
        model: Shorthand for `model.path`.
        models_dir: Shorthand for `model.models_dir`.
        host: Shorthand for `http.host`.
        port: Shorthand for `http.port`.

    Raises:
        ConfigurationError: Naming the setting.
    """
    tree: dict[str, Any] = {}
    assigned(tree, assignments)
    shorthands = {
        "model.path": model,
        # Read by other processes, which may work elsewhere.
        "model.models_dir": None if models_dir is None else str(Path(models_dir).absolute()),
        "http.host": host,
        "http.port": port,
    }
    for path, value in shorthands.items():
        if value is not None:
            _assign(tree, path, value)
    if any(isinstance(tree.get(stage), dict) for stage in _STAGES):
        # A pool is an element of a list, and lists are replaced rather than merged: begin with
        # what the other sources say about it.
        beneath = load_settings(config)
        for stage in _STAGES:
            if isinstance(changed := tree.get(stage), dict):
                tree[stage] = [{**_only_pool(beneath, stage).model_dump(), **changed}]
    return load_settings(config, tree)


def assigned(tree: dict[str, Any], assignments: Iterable[str]) -> None:
    """Put values into a tree of settings.

    Args:
        tree: Changed in place.
        assignments: Each `a.b=value`; the value is read as YAML, so `2` is a number.

    Raises:
        ConfigurationError: It is no assignment, or lies beneath a value.
    """
    for assignment in assignments:
        path, value = _parsed(assignment)
        _assign(tree, path, value)


def _only_pool(settings: Settings, stage: str) -> PoolSettings:
    pools: tuple[PoolSettings, ...] = getattr(settings, stage)
    first, *others = pools
    if others:
        names = ", ".join(pool.name for pool in (first, *others))
        raise ConfigurationError(
            f"--set cannot tell the pools of {stage} apart: {names}.",
            field=stage,
            allowed="change them in the file, or give them all: --set 'denoiser=[{name: ...}]'",
        )
    return first


def _parsed(assignment: str) -> tuple[str, Any]:
    path, equals, text = assignment.partition("=")
    path = path.strip()
    if not equals or not all(path.split(".")):
        raise ConfigurationError(
            "--set takes a setting and its value.", field="set", value=assignment, allowed=_ALLOWED
        )
    try:
        return path, yaml.safe_load(text)
    except yaml.YAMLError:
        return path, text


def _assign(tree: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigurationError(
                f"Setting {path!r} lies beneath a setting that is a value.",
                field="set",
                value=path,
                allowed=_ALLOWED,
            )
    node[name] = value
