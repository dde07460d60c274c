"""`kelvin models`: which models a running service has; another one beside them, or one less."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError
from rich.table import Table

from serve.commands.output import EXIT_OK, console, stdout_is_for_json, write_json
from serve.commands.overrides import assigned
from serve.config import ModelEntry, ModelSettings, Settings
from serve.errors import ConfigurationError
from serve.further_models import SECTIONS, like_the_services
from serve.model_dir import model_name, resolve_model_dir
from serve.models import ModelSpec

if TYPE_CHECKING:
    from cluster.pool_state import Stage


def list_models(url: str, *, as_json: bool, api_key: str | None = None) -> int:
    """Show every model of the service at a URL.

    Raises:
        ServerUnreachable: Nothing answers there.
    """
    from serve.client import Kelvin

    with Kelvin(url, api_key=api_key) as client:
        models = client.models()
    if as_json:
        write_json({"models": models})
        return EXIT_OK
    table = Table(show_lines=False, pad_edge=False)
    for heading in ("model", "state", "by default", "shares"):
        table.add_column(heading, overflow="fold")
    for model in models:
        table.add_row(model["name"], model["state"], _defaults(model), ", ".join(_shares(model)))
    console().print(table)
    return EXIT_OK


def load(
    *,
    model: str | None,
    models_dir: str | None,
    name: str | None,
    config: Path | None,
    assignments: Iterable[str],
    wait_s: float,
    as_json: bool,
) -> int:
    """Load a model beside those that a running service has.

    Raises:
        ConfigurationError: Its files, name or pools do not fit; the service is as it was.
        ModelConflict: It is there already, or not ready in time.
    """
    from serve.model_admin import ModelAdmin, join_ray

    tree = _read(config)
    assigned(tree, assignments)
    stated = {"path": model, "models_dir": models_dir, "name": name}
    # Read by other processes, which may work elsewhere.
    if models_dir is not None:
        stated["models_dir"] = str(Path(models_dir).absolute())
    elif model is not None and Path(model).exists():
        stated["path"] = str(Path(model).absolute())
    given = {key: value for key, value in stated.items() if value is not None}
    tree["model"] = {**(tree.get("model") or {}), **given}
    with stdout_is_for_json() as stdout:
        join_ray()
        admin = ModelAdmin(lambda said: console().print(said, soft_wrap=True))
        loaded = admin.load(entry_of(tree, admin.settings()), wait_s)
        if as_json:
            write_json(loaded, stdout)
        else:
            console().print(f"[green]Loaded[/] {loaded['name']}: {_defaults(loaded)}")
    return EXIT_OK


def unload(name: str, wait_s: float, *, as_json: bool) -> int:
    """Take a model out of a running service once its jobs are done.

    Raises:
        ModelNotFound: There is none of that name.
        ModelConflict: It is the service's own, or its jobs did not end in time.
    """
    from serve.model_admin import ModelAdmin, join_ray

    with stdout_is_for_json() as stdout:
        join_ray()
        admin = ModelAdmin(lambda said: console().print(said, soft_wrap=True))
        admin.unload(name, wait_s)
        if as_json:
            write_json({"unloaded": name}, stdout)
        else:
            console().print(f"[green]Unloaded[/] {name}.")
    return EXIT_OK


def entry_of(tree: dict[str, Any], service: Settings) -> ModelEntry:
    """Return the settings of a further model.

    Args:
        tree: As an element of section `models`; a stage that is a mapping instead of a list is one
            pool, like the service's first one but for what it states.
        service: Settings of the service.

    Raises:
        ConfigurationError: Naming the setting.
    """
    tree = dict(tree)
    for stage, section in SECTIONS.items():
        if isinstance(changed := tree.get(section), dict):
            pool = like_the_services(service, stage, _name(tree)).model_dump()
            tree[section] = [{**pool, **changed}]
    entry: ModelEntry = _validated(ModelEntry, tree)
    return entry


def _name(tree: dict[str, Any]) -> str:
    model = _validated(ModelSettings, tree.get("model") or {})
    folder = resolve_model_dir(model, weights=False)
    return ModelSpec.from_directory(folder, model_name(model)).name


def _validated(kind: Any, tree: dict[str, Any]) -> Any:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        setting = ".".join(map(str, first["loc"])) or "model"
        raise ConfigurationError(
            f"Setting {setting!r}: {first['msg']}.",
            field=setting,
            value=None if first["type"] == "missing" else first["input"],
            allowed="see the table of settings in README.md, section models",
        ) from None


def _read(config: Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    try:
        loaded = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        loaded, why = None, f"Cannot read it: {error}"
    else:
        why = "It is not a mapping."
    if not isinstance(loaded, dict):
        raise ConfigurationError(
            why,
            field="config",
            value=str(config),
            allowed="a YAML mapping as one element of section models: model, denoiser, ...",
        )
    return loaded


def _defaults(model: dict[str, Any]) -> str:
    defaults = model.get("defaults")
    if defaults is None:
        return str(model.get("message", ""))
    return (
        f"{defaults['width']}x{defaults['height']}, {defaults['num_inference_steps']} steps,"
        f" guidance {defaults['guidance_scale']:g}"
    )


def _shares(model: dict[str, Any]) -> list[Stage]:
    return list(model.get("shares", ()))
