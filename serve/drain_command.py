"""`kelvin drain`: what its options mean. What it does is in `serve.commands.drain`."""

from typing import Annotated, Any

import typer

from serve.command_options import Json, number


def drain(
    node: Annotated[
        str, typer.Argument(metavar="NODE", help="Id of it or its beginning, address or hostname.")
    ],
    deadline: Annotated[
        Any,
        typer.Option(
            parser=number,
            metavar="SECONDS",
            help="After which the machine goes, replaced or not; replicas stop their graceful time "
            "(120 s or more) before it. None if absent.",
        ),
    ] = None,
    wait: Annotated[
        Any,
        typer.Option(parser=number, metavar="SECONDS", help="To watch; the drain goes on after."),
    ] = 3600.0,
    force: Annotated[
        bool, typer.Option("--force", help="Even if a stage is left without any replica.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would go, and where there is room.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Take a Ray node out of service without losing a job.

    Nothing new is placed there; replicas are replaced elsewhere first, where there is room, then
    finish what they have. There is no undo, for Ray has none: its node ends as soon as nothing runs
    there, and nobody can tell it to stay. `ray start` on the same machine makes a new one, at once
    or later. It goes through Ray: run it on the machine of `kelvin up`, or where RAY_ADDRESS leads.
    """
    from serve.commands.drain import drain as run

    return run(
        node, deadline_s=deadline, wait_s=wait, force=force, dry_run=dry_run, as_json=as_json
    )
