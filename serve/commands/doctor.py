"""`kelvin doctor`: what this machine, the model and the store can do, and what to repair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from serve.commands.finding import Finding, table_of
from serve.commands.hardware import (
    check_disk,
    check_driver,
    check_gpus,
    check_precision,
    check_python,
    check_torch,
    find_gpus,
    find_torch,
)
from serve.commands.lora_check import check_loras
from serve.commands.model_files import check_model
from serve.commands.output import (
    EXIT_FAILED,
    EXIT_OK,
    console,
    stdout_is_for_json,
    write_json,
)
from serve.commands.store_check import check_store
from serve.config import ModelSettings, Settings
from serve.errors import KelvinError


def doctor(settings: Settings, *, as_json: bool) -> int:
    """Run every check; return 1 if any failed."""
    with stdout_is_for_json() as stdout:
        with console().status("Looking at this machine ..."):
            findings = tuple(examine(settings))
        healthy = all(finding.verdict != "failed" for finding in findings)
        if as_json:
            write_json({"ok": healthy, "checks": [finding.body() for finding in findings]}, stdout)
        else:
            console().print(table_of(findings))
            console().print(
                "[green]Kelvin can run here.[/]" if healthy else "[bold red]Not ready yet.[/]"
            )
    return EXIT_OK if healthy else EXIT_FAILED


def examine(settings: Settings) -> Iterator[Finding]:
    """Yield the finding of every check, cheapest first."""
    build, gpus = find_torch(), find_gpus()
    yield check_python()
    yield check_torch(build, gpus)
    yield check_gpus(gpus)
    yield check_driver(build, gpus)
    yield from _guarded(
        "precision",
        lambda: [
            check_precision(
                settings.denoiser[0].precision, build, gpus, _transformer(settings.model)
            )
        ],
    )
    yield from _guarded("ray", lambda: [_check_ray()])
    yield check_disk(Path(settings.embedded_store.data_dir))
    yield from _guarded("model", lambda: _check_model(settings, settings.model))
    for index, entry in enumerate(settings.models):
        name = entry.model.name or f"models.{index}"
        for finding in _guarded(name, lambda entry=entry: _check_model(settings, entry.model)):  # type: ignore[misc]
            yield replace(finding, name=f"{name}: {finding.name}")
    if settings.models:
        yield from _guarded("models", lambda: _check_names(settings))
    yield from _guarded("store", lambda: check_store(settings))


def _check_model(settings: Settings, model: ModelSettings) -> list[Finding]:
    findings = check_model(model)
    if any(finding.verdict == "failed" for finding in findings):
        return findings
    return [*findings, *check_loras(model, settings.lora)]


def _check_names(settings: Settings) -> list[Finding]:
    """Say what keeps models from standing side by side, each of which may be well by itself."""
    from serve.further_models import further_models
    from serve.model_dir import model_name, resolve_model_dir
    from serve.models import ModelSpec

    try:
        folder = resolve_model_dir(settings.model, weights=False)
        own = ModelSpec.from_directory(folder, model_name(settings.model))
        further_models(settings, own.name)
    except KelvinError as error:
        return [Finding("models", "failed", error.message, error.allowed or "see models")]
    return [Finding("models", "ok", f"{len(settings.models)} beside {own.name}")]


def _check_ray() -> Finding:
    import ray
    from ray import serve

    return Finding("ray", "ok", f"{ray.__version__} with {serve.__name__}")


def _transformer(model: ModelSettings) -> Path | None:
    """Return the folder of the model's transformer; None where the model's own check fails."""
    from serve.model_dir import resolve_model_dir

    try:
        folder = resolve_model_dir(model, weights=False) / "transformer"
    except (KelvinError, OSError):
        return None
    return folder if folder.is_dir() else None


def _guarded(name: str, check: Callable[[], Sequence[Finding]]) -> Sequence[Finding]:
    """Run a check that imports what may be broken; a diagnosis must outlive what it finds."""
    try:
        return check()
    except ImportError as error:
        return [Finding(name, "failed", f"cannot be imported: {error}", "run `make install`")]
