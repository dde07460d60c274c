"""Runbooks name only commands, metrics, settings, errors and pages that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from cluster.pool_gauges import POOL_METRICS
from serve import errors
from serve.__main__ import app
from serve.commands.settings_table import settings_table
from serve.metric_table import METRICS
from tests.monitoring_files import FOLDER, rules

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "cluster" / "runbooks").glob("*.md"))
PARTS = ("**Seen as**", "**Do**", "**Over when**")
SETTINGS = re.findall(r"^\| `([a-z_0-9.]+)` \|", settings_table(), re.MULTILINE)
METRIC_NAMES = {f"ray_{name}" for name in {**METRICS, **POOL_METRICS}}
CODES = {
    kind.code
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.KelvinError)
}


def code_spans(page: Path) -> list[str]:
    return re.findall(r"`([^`]+)`", page.read_text(encoding="utf-8"))


def test_there_is_a_page_for_each_of_the_ten_things_that_go_wrong() -> None:
    assert len(PAGES) >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for part in PARTS:
        assert part in text
    for span in code_spans(page):
        if span.startswith("kelvin "):
            check_command(span)
        elif span.startswith("ray_kelvin"):
            assert span in METRIC_NAMES
        elif re.fullmatch(r"[a-z_]+\.[a-z_]+", span):
            assert span in SETTINGS
        elif re.fullmatch(r"[a-z]+_[a-z_]+", span):
            assert span in CODES
        elif span.startswith("cluster/"):
            assert (ROOT / span).exists()
    for linked in re.findall(r"\]\(([^)]+)\)", text):
        assert (page.parent / linked).is_file(), linked
    for path in re.findall(r"tests/\S+\.py", text):
        assert (ROOT / path).is_file(), path


def check_command(typed: str) -> None:
    command: Any = typer.main.get_command(app)
    for word in shlex.split(typed)[1:]:
        if hasattr(command, "commands"):
            assert word in command.commands, typed
            command = command.commands[word]
        elif word.startswith("-"):
            known = {
                option
                for parameter in command.params
                for option in (*parameter.opts, *parameter.secondary_opts)
            }
            assert word in known, f"{word} in {typed}"
    assert not hasattr(command, "commands"), typed


def test_every_alert_leads_to_a_page_that_names_it() -> None:
    for rule in rules():
        page = FOLDER / rule["annotations"]["runbook"]
        assert rule["alert"] in page.read_text(encoding="utf-8")


def test_a_command_that_is_not_there_is_seen() -> None:
    for typed in ("kelvin melt", "kelvin status --twice", "kelvin cluster"):
        with pytest.raises(AssertionError):
            check_command(typed)
