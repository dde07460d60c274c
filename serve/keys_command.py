"""`kelvin keys ...`: what the options mean; what they do is in `serve.commands.keys`."""

from typing import Annotated

import typer

from serve.command_options import Config, Json
from serve.tenants import DEFAULT_TENANT, ROLES

_KEYS_EXAMPLES = """
[bold]Examples[/]

kelvin keys create --tenant acme --label "Ada's laptop" [dim]# shown once, kept nowhere[/]

kelvin keys create --role admin --role generate -c cluster.yaml [dim]# for a service on S3[/]

kelvin keys list

kelvin keys revoke 3f9ac1d20b7e [dim]# counts no more within seconds, everywhere[/]

KELVIN_API_KEY=kelvin_... kelvin generate "a red circle" --url https://kelvin.example.org

Keys lie in the service's own store, so give the settings that `kelvin up` is given, and run it in
the same folder where the store is the embedded one.
"""

keys_app = typer.Typer(
    name="keys",
    help="API keys, which a service that others reach asks for: make, list and revoke them.",
    epilog=_KEYS_EXAMPLES,
    no_args_is_help=True,
    rich_markup_mode="rich",
)
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SETTING=VALUE", help="As keys.file=keys.json; repeatable."),
]


@keys_app.command("create")
def keys_create(
    tenant: Annotated[
        str, typer.Option(help="Whose it is: keys of one tenant see each other's jobs, no others.")
    ] = DEFAULT_TENANT,
    role: Annotated[
        list[str] | None,
        typer.Option(help=f"{' or '.join(ROLES)}; repeatable; generate if absent."),
    ] = None,
    label: Annotated[str, typer.Option(help="For people, as who has it.")] = "",
    config: Config = None,
    assignments: Assignments = None,
    as_json: Json = False,
) -> int:
    """Make a key and show it, this once: only a digest of it is kept."""
    from serve.commands.keys import create

    return create(
        tenant=tenant,
        roles=role or ["generate"],
        label=label,
        config=config,
        assignments=assignments or (),
        as_json=as_json,
    )


@keys_app.command("list")
def keys_list(config: Config = None, assignments: Assignments = None, as_json: Json = False) -> int:
    """Show every key's id, tenant, roles and label; never the key."""
    from serve.commands.keys import list_keys

    return list_keys(config=config, assignments=assignments or (), as_json=as_json)


@keys_app.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `kelvin keys list` shows it.")],
    config: Config = None,
    assignments: Assignments = None,
    as_json: Json = False,
) -> int:
    """Take a key back; jobs that it sent go on."""
    from serve.commands.keys import revoke

    return revoke(key_id, config=config, assignments=assignments or (), as_json=as_json)
