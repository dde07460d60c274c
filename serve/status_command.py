"""`kelvin status`: what its options mean. What it does is in `serve.commands.status`."""

from typing import Annotated, Any

import typer

from serve.command_options import ApiKey, Json, Url, number
from serve.loopback import DEFAULT_URL


def status(
    url: Url = DEFAULT_URL,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    refresh: Annotated[
        Any, typer.Option(parser=number, metavar="SECONDS", help="Between two looks.")
    ] = 1.0,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> int:
    """Show a running service: pools, why they are so large, replicas, cards, temperatures, queues.

    On a terminal it goes on until Ctrl-C, the hottest cards first; elsewhere, and with --once or
    --json, it looks once. Where the service asks for keys, one of role admin.
    """
    from serve.commands.status import status as run

    return run(url, once=once, refresh_s=refresh, as_json=as_json, api_key=api_key)
