"""Options that several commands have."""

from pathlib import Path
from typing import Annotated, Any

import typer

Config = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of settings.")]
Url = Annotated[str, typer.Option(envvar="KELVIN_URL", help="The server.")]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON object as stdout's last line; the rest on stderr.")
]
ModelsDir = Annotated[
    str | None,
    typer.Option("--models-dir", help="ComfyUI's models folder, where MODEL is.", metavar="FOLDER"),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="KELVIN_API_KEY",
        help="Where the server asks for one; better by the variable: ps shows options.",
        show_default=False,
    ),
]


def integer(text: str) -> Any:
    """Return a whole number, or what was typed, to be refused by who knows what is allowed."""
    try:
        return int(text)
    except ValueError:
        return text


def number(text: str) -> Any:
    """Return a number, or what was typed, as `integer` does."""
    try:
        return float(text)
    except ValueError:
        return text
