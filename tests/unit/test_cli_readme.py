"""The README says what the code says: settings, errors, commands."""

import json
from pathlib import Path

import yaml

from serve import errors
from serve.__main__ import app
from serve.commands.settings_table import settings_table
from serve.config import ModelEntry, ModelSettings, Settings
from serve.requests import GenerateRequest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_settings_is_the_generated_one() -> None:
    assert settings_table() in README, "run: python -m serve.commands.settings_table README.md"


def test_every_setting_is_in_the_generated_table() -> None:
    table = settings_table()
    sections = {
        name: getattr(Settings(), name)
        for name in Settings.model_fields
        if name not in ("text_encoder", "vae_decoder")
    }
    sections["denoiser"] = Settings().denoiser[0]
    sections["models"] = ModelEntry(model=ModelSettings())
    sections["model.source"] = sections["model"].source
    for section, value in sections.items():
        for name in type(value).model_fields:
            assert f"`{section}.{name}`" in table or f"{section}.{name}" in sections


def test_every_setting_says_what_it_means() -> None:
    silent = [row for row in settings_table().splitlines() if row.endswith("|  |")]
    assert silent == []


def test_every_error_a_caller_may_see_is_listed() -> None:
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.KelvinError):
            if kind is errors.KelvinError:
                continue
            assert f"| {kind.status} | `{kind.code}` | `{kind.__name__}` |" in README


def test_every_field_that_diffusers_users_do_not_know_is_explained() -> None:
    for name in (
        "priority",
        "deadline_s",
        "guidance_interval",
        "negative_prompt_range",
        "preview_every",
    ):
        assert name in GenerateRequest.model_fields
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
        example = row.split("|")[2].strip().strip("`")
        GenerateRequest.model_validate({"prompt": "x", name: json.loads(example)})


def test_no_reserved_field_is_explained_as_if_it_did_something() -> None:
    for name in GenerateRequest.RESERVED:
        assert f"| `{name}` |" not in README


def test_every_command_is_shown() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        assert f"kelvin {command.callback.__name__}" in README or (
            f"make {command.callback.__name__}" in README
        )


def test_the_cluster_example_is_valid() -> None:
    block = README.split("```yaml")[1].split("```")[0]
    (application,) = yaml.safe_load(block)["applications"]
    settings = Settings.model_validate(application["args"])
    assert settings.denoiser[0].accelerator_type == "H100"
