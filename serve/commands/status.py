"""`kelvin status`: a running service, once or again and again until Ctrl-C."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from serve.client import Kelvin
from serve.client_errors import UnexpectedAnswer
from serve.commands.output import EXIT_OK, console, write_json
from serve.commands.status_tables import StatusView, checked_status
from serve.commands.stopping import stoppable
from serve.errors import InvalidRequest, KelvinError

_SHORTEST_S, _LONGEST_S = 0.2, 3600.0


def status(url: str, *, once: bool, refresh_s: Any, as_json: bool, api_key: str | None) -> int:
    """Show a service: live on a terminal, once elsewhere.

    What fails after the first look is shown and tried again: it is then that one looks.

    Raises:
        InvalidRequest: `refresh_s` is no number of seconds.
        ServerUnreachable: Nothing answers there.
        UnexpectedAnswer: Something else than Kelvin does.
    """
    if not isinstance(refresh_s, float | int) or not _SHORTEST_S <= refresh_s <= _LONGEST_S:
        raise InvalidRequest(
            "This is no time between two looks.",
            field="refresh",
            value=refresh_s,
            allowed=f"{_SHORTEST_S:g} to {_LONGEST_S:g} seconds",
        )
    out = console()
    with Kelvin(url, api_key=api_key) as client:
        body = _look(client)
        if as_json:
            write_json(body)
            return EXIT_OK
        if once or not out.is_terminal:
            out.print(StatusView(body))
            return EXIT_OK
        shown: RenderableType = StatusView(body, fits_height=True)
        # Of its own: scripts start what runs beside them with SIGINT ignored, and SIGTERM would
        # leave the terminal on the other screen.
        with stoppable(), Live(shown, console=out, screen=True, auto_refresh=False) as live:
            try:
                while True:
                    live.update(shown, refresh=True)
                    time.sleep(refresh_s)
                    try:
                        body, problem = _look(client), None
                    except KelvinError as error:
                        problem = Text(f"{error.message} Shown is what was.", "bold red")
                    view = StatusView(body, fits_height=True)
                    shown = view if problem is None else Group(problem, view)
            except KeyboardInterrupt:
                return EXIT_OK  # it is how one leaves


def _look(client: Kelvin) -> dict[str, Any]:
    try:
        return checked_status(client.status())
    except ValueError as error:
        raise UnexpectedAnswer("The server's status is no JSON.") from error
