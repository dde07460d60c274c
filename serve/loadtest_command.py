"""`kelvin loadtest`: what its options mean. What it does is in `serve.commands.loadtest`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from serve.command_options import ApiKey, Json, integer, number
from serve.loopback import DEFAULT_URL

_LOAD = "Load"
_SERVICE = "Service"
_REPORT = "Report"


def loadtest(
    profile: Annotated[
        str,
        typer.Option(
            help="How requests come: steady, step (four stairs), burst (three), diurnal (a day) "
            "or replay (of --trace).",
            rich_help_panel=_LOAD,
        ),
    ] = "steady",
    rate: Annotated[
        Any,
        typer.Option(
            parser=number,
            metavar="NUMBER",
            help="Requests a second, on average.",
            rich_help_panel=_LOAD,
        ),
    ] = 1.0,
    duration: Annotated[
        Any,
        typer.Option(
            parser=number,
            metavar="SECONDS",
            help="In which requests come; 60 if absent, of a replay the whole trace.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    door: Annotated[
        str,
        typer.Option(
            help="native, openai, comfyui, handle (Ray Serve's), or mixed: all there are.",
            rich_help_panel=_LOAD,
        ),
    ] = "native",
    mix: Annotated[
        str,
        typer.Option(
            help="varied: sizes and steps around the model's own; plain: just those.",
            rich_help_panel=_LOAD,
        ),
    ] = "varied",
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="SET|FILE",
            help="scenes, general, or a file with one a line; what fits the model if absent.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv",
            help="With a column at_s, and any of prompt, negative_prompt, width, height, "
            "num_inference_steps, guidance_scale, seed.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    seed: Annotated[
        Any,
        typer.Option(
            parser=integer,
            metavar="INTEGER",
            help="The same seed is the same load.",
            rich_help_panel=_LOAD,
        ),
    ] = 0,
    url: Annotated[
        str | None,
        typer.Option(
            envvar="KELVIN_URL",
            help=f"The server; {DEFAULT_URL} if absent.",
            rich_help_panel=_SERVICE,
        ),
    ] = None,
    api_key: ApiKey = None,
    start: Annotated[
        bool,
        typer.Option(
            "--start", help="Start a Kelvin on this machine for it.", rich_help_panel=_SERVICE
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Of --start: builtin if absent, pico, a folder or a file.",
            rich_help_panel=_SERVICE,
        ),
    ] = None,
    slo_s: Annotated[
        Any,
        typer.Option(
            "--slo-s",
            "--slo",
            parser=number,
            metavar="SECONDS",
            help="What counts as in time; three times the latency without load if absent.",
            rich_help_panel=_REPORT,
        ),
    ] = None,
    require: Annotated[
        Any,
        typer.Option(
            parser=number,
            metavar="SHARE",
            help="Exit 1 unless so large a share, 0 to 1, is right and in time.",
            rich_help_panel=_REPORT,
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="For report.html, report.json and what they are made of.",
            rich_help_panel=_REPORT,
        ),
    ] = Path("out/loadtest"),
    as_json: Json = False,
) -> int:
    r"""Put a running Kelvin under load, check every picture, and write a report as one page.

    An open loop: requests are sent when they are due, whatever became of those before, and latency
    counts from then. Exit code 1 if a picture was wrong or lost, or a request failed otherwise than
    by being told to come later; being slow is no failure unless --require says so.
    Needs locust: pip install 'kelvin-serve\[loadtest]'.
    """
    from serve.commands.loadtest import Asked
    from serve.commands.loadtest import loadtest as run

    return run(
        Asked(
            profile=profile,
            rate=rate,
            duration_s=duration,
            door=door,
            mix=mix,
            prompts=prompts,
            trace=trace,
            seed=seed,
            url=url,
            api_key=api_key,
            start=start,
            model=model,
            slo_s=slo_s,
            require=require,
            out=out,
            as_json=as_json,
        )
    )
