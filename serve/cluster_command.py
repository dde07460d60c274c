"""`kelvin cluster ...`: what the options mean; what they do is in `serve.commands.cluster_plan`."""

from typing import Annotated, Any

import typer

from serve.command_options import Json, integer, number

_EXAMPLES = r"""
[bold]Examples[/]

kelvin cluster plan --rate 20 --size 1024 --steps 28

kelvin cluster plan --rate 2 --model medium --size 768x1344 --card H100 --card L4

kelvin cluster plan --rate 20 --price H100=6.9 --price L4=0.8 --card H100 --card L4 --json
"""

cluster_app = typer.Typer(
    name="cluster",
    help="A cluster before there is one: how many cards of which kind, and what they draw.",
    epilog=_EXAMPLES,
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@cluster_app.callback()
def _group() -> None:
    """Keep `plan` a subcommand, which typer would otherwise make the whole of `cluster`."""


@cluster_app.command("plan", epilog=_EXAMPLES)
def cluster_plan(
    rate: Annotated[
        Any, typer.Option(parser=number, metavar="NUMBER", help="Pictures a second, on average.")
    ],
    size: Annotated[str, typer.Option(metavar="SIDE|WxH", help="Pixels, multiples of 16.")] = (
        "1024"
    ),
    steps: Annotated[
        Any,
        typer.Option(
            parser=integer, metavar="INTEGER", help="Of a picture; 28 if absent, of Turbo 4."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="large, large-turbo or medium.")] = "large",
    guidance: Annotated[
        bool | None,
        typer.Option(
            "--guidance/--no-guidance",
            help="Two rows a step, two prompts a request; with, if absent, but for Turbo.",
        ),
    ] = None,
    card: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help="H100, L4 or A10G; repeatable, all three if absent."),
    ] = None,
    heat_headroom: Annotated[
        Any,
        typer.Option(
            parser=number, metavar="SHARE", help="Of a card's cool speed that heat may take."
        ),
    ] = 0.1,
    utilisation: Annotated[
        Any,
        typer.Option(
            parser=number,
            metavar="SHARE",
            help="To which cards may be filled; the rest keeps queues short.",
        ),
    ] = 0.75,
    price: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=USD", help="US dollars an hour of one card; repeatable. None is assumed."
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Say how many cards of which kind a rate of pictures needs, and what they draw.

    From speeds measured on an H100. What was not measured is marked as an estimate, with what it
    was reckoned from. Text and decoding share cards. Starts nothing and needs no card.
    """
    from serve.commands.cluster_plan import Asked, plan

    return plan(
        Asked(
            rate=rate,
            size=size,
            steps=steps,
            model=model,
            guidance=guidance,
            cards=tuple(card or ()),
            heat_headroom=heat_headroom,
            utilisation=utilisation,
            prices=tuple(price or ()),
        ),
        as_json=as_json,
    )
