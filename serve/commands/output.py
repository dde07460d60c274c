"""How every command speaks: people read stderr, programs read one JSON object on stdout.

The last line on stdout under `--json` is that object and nothing else is ever written there, so
`kelvin ... --json | tail -1 | jq` works whatever Ray or a library prints.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from serve.errors import ConfigurationError, KelvinError, ModelNotFound

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def console() -> Console:
    """Return the console for people; made anew because tests replace stderr."""
    return Console(stderr=True, highlight=False)


def write_json(body: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Write one JSON object as one line to `stream` (stdout if None) and flush it."""
    target = stream or sys.stdout
    target.write(json.dumps(body, allow_nan=False) + "\n")
    target.flush()


def exit_code(error: KelvinError) -> int:
    """Return 2 where the caller can repair what was typed or set, 1 for everything else."""
    caller_can_repair = 400 <= error.status < 500 and error.status not in (404, 409, 429)
    repairable = caller_can_repair or isinstance(error, ConfigurationError | ModelNotFound)
    return EXIT_BAD_INPUT if repairable else EXIT_FAILED


def write_error(error: KelvinError, *, as_json: bool) -> None:
    """Say what went wrong: the error's JSON body on stdout, or lines for a person on stderr."""
    if as_json:
        write_json(error.body())
        return
    # Text, never markup: a prompt may contain square brackets.
    message = Text("Error: ", style="bold red")
    message.append(error.message, style="red")
    out = console()
    out.print(message, soft_wrap=True)
    for name in ("field", "value", "allowed"):
        if (shown := getattr(error, name)) is not None:
            out.print(Text(f"  {name:<8} {shown}"), soft_wrap=True)


@contextmanager
def stdout_is_for_json() -> Iterator[TextIO]:
    """Send all that is printed inside to stderr and yield the real stdout.

    Ray prints its workers' logs on stdout, and child processes inherit the descriptor.
    """
    real, errors = sys.stdout, sys.stderr
    try:
        descriptor, error_descriptor = real.fileno(), errors.fileno()
    except (io.UnsupportedOperation, AttributeError):  # not a file, as under a test's capture
        with redirect_stdout(errors):
            yield real
        return
    real.flush()
    kept = os.dup(descriptor)
    os.dup2(error_descriptor, descriptor)
    try:
        with (
            os.fdopen(os.dup(kept), "w", encoding="utf-8") as stream,
            redirect_stdout(errors),
        ):
            yield stream
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
