"""The `kelvin` command: what the options mean. What they do is in `serve.commands`.

Numbers arrive as they were typed and are judged by the contract, so that the command line, HTTP
and the Python handle say the same about the same mistake.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from serve.cluster_command import cluster_app
from serve.command_options import Config, Json, ModelsDir, integer
from serve.commands.output import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    console,
    exit_code,
    write_error,
)
from serve.drain_command import drain
from serve.errors import InvalidRequest, KelvinError
from serve.generate_command import generate
from serve.keys_command import keys_app
from serve.loadtest_command import loadtest
from serve.models_command import models_app
from serve.status_command import status

_EXAMPLES = """
[bold]Examples[/]

kelvin demo [dim]# everything on this machine, one picture, then stop[/]

kelvin doctor [dim]# what this machine can do, and what is missing[/]

kelvin up [dim]# serve the built-in model; Ctrl-C stops it[/]

kelvin generate "a large red circle left of a small blue square" -o out.png

kelvin generate --from out.png --seed 8 -o again.png

kelvin up --model /models/stable-diffusion-3.5-large --config cluster.yaml

kelvin up --model sd3.5_large_fp8_scaled.safetensors --models-dir ComfyUI/models

kelvin models load /models/stable-diffusion-3.5-medium [dim]# beside what is served[/]

kelvin status [dim]# pools, replicas, cards and queues, live[/]

kelvin loadtest --profile burst --duration 120 [dim]# load, and a report of what became of it[/]
"""

app = typer.Typer(
    name="kelvin",
    help="Stable Diffusion 3.5 in FP8 on Ray Serve: a prompt in, a picture in S3 out.",
    epilog=_EXAMPLES,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(models_app)
app.add_typer(keys_app)
app.add_typer(cluster_app)
app.command()(loadtest)
app.command()(status)
app.command()(drain)


Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SETTING=VALUE", help="As storage.bucket=pictures; repeatable."),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="builtin, pico, a folder in Diffusers layout, or a .safetensors file.",
        metavar="MODEL",
    ),
]


@app.command()
def up(
    config: Config = None,
    model: Model = None,
    models_dir: ModelsDir = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[
        Any, typer.Option(parser=integer, metavar="INTEGER", help="Port; 0 takes a free one.")
    ] = None,
    assignments: Assignments = None,
    as_json: Json = False,
) -> int:
    """Serve a model on this machine until Ctrl-C.

    Starts Ray, the three stages and, where no S3 endpoint is set, an S3 server of its own.
    """
    from serve.commands.overrides import settings_from_options
    from serve.commands.up import up as run

    settings = settings_from_options(
        config, assignments or (), model=model, models_dir=models_dir, host=host, port=port
    )
    return run(settings, as_json=as_json)


app.command()(generate)


@app.command()
def doctor(
    config: Config = None,
    model: Model = None,
    models_dir: ModelsDir = None,
    assignments: Assignments = None,
    as_json: Json = False,
) -> int:
    """Check this machine, the model and the object store; say how to repair what fails."""
    from serve.commands.doctor import doctor as run
    from serve.commands.overrides import settings_from_options

    settings = settings_from_options(config, assignments or (), model=model, models_dir=models_dir)
    return run(settings, as_json=as_json)


@app.command()
def sweep(
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Of jobs that have ended: 30d, 12h, 90m.")
    ],
    config: Config = None,
    assignments: Assignments = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    as_json: Json = False,
) -> int:
    """Remove old jobs with their pictures, and pictures that no job names, at any time."""
    from serve.commands.overrides import settings_from_options
    from serve.commands.sweep import sweep as run

    settings = settings_from_options(config, assignments or ())
    return run(settings, older_than, dry_run=dry_run, as_json=as_json)


@app.command()
def demo(
    prompt: Annotated[
        str, typer.Option(help="A scene the built-in model knows.")
    ] = "a large red circle left of a small blue square",
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path(
        "out/demo.png"
    ),
    seed: Annotated[
        Any,
        typer.Option(parser=integer, metavar="INTEGER", help="Fixed: all see the same picture."),
    ] = 1,
    as_json: Json = False,
) -> int:
    """Start everything on this machine with the built-in model, make one picture, stop."""
    from serve.commands.demo import demo as run

    return run(prompt, output, seed, as_json=as_json)


@app.command()
def simulate(
    scenario: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|FILE", help="A shipped scenario or a YAML file; repeatable."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="queue-only, threshold, kelvin-without-heat or kelvin; all four if absent."
        ),
    ] = None,
    seed: Annotated[
        Any,
        typer.Option(parser=integer, metavar="INTEGER", help="The scenario's first if absent."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Page to draw, .png or .html.")] = None,
    suite: Annotated[
        bool, typer.Option("--suite", help="Compare all policies on all scenarios and seeds.")
    ] = False,
    fit: Annotated[
        bool, typer.Option("--fit", help="Fit the thermal model to the recorded H100.")
    ] = False,
    day: Annotated[bool, typer.Option("--day", help="A thousand cards for a day.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Choose the rivals' settings anew.")] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Of each scenario, with --suite; all if absent.")
    ] = None,
    held_out: Annotated[
        bool,
        typer.Option(
            "--held-out", help="With --suite: seeds and bursts that no setting was chosen by."
        ),
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; as many as cores if absent.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Run a simulated cluster: what queue, heat and failing cards do to latency, by policy."""
    from serve.commands import simulate as command

    named = scenario or []
    if fit:
        return command.fit(as_json=as_json)
    if suite:
        return command.suite(
            scenarios=named,
            seeds=seeds,
            processes=processes,
            as_json=as_json,
            held_out=held_out,
        )
    if tune:
        return command.tune(scenarios=named, processes=processes, as_json=as_json)
    return command.simulate(
        scenario="day" if day else (named[0] if named else None),
        policies=policy or (["kelvin"] if day else []),
        seed=seed,
        plot=plot,
        as_json=as_json,
    )


# typer carries its own copy of click in newer versions, so click itself may not be asked.
_UsageError: Any = typer.BadParameter.__base__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 bad input, 130 interrupted.

    Args:
        arguments: What follows `kelvin` on the command line; the process's own if None.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    try:
        return int(app(given, prog_name="kelvin", standalone_mode=False) or EXIT_OK)
    except _UsageError as usage:
        error: KelvinError = _usage(usage)
    except KelvinError as told:
        error = told
    except (KeyboardInterrupt, typer.Abort):
        console().print("Interrupted.")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_FAILED
    except Exception as unforeseen:  # the last line of defence: a person never sees a traceback
        if os.environ.get("KELVIN_TRACEBACK"):
            raise
        error = KelvinError(
            f"Unforeseen {type(unforeseen).__name__}: {unforeseen}",
            allowed="a report of this as a bug; KELVIN_TRACEBACK=1 shows where it arose",
        )
    write_error(error, as_json=as_json)
    return exit_code(error)


def _usage(usage: Any) -> InvalidRequest:
    parameter = getattr(usage, "param", None)
    field = parameter.name if parameter is not None else getattr(usage, "option_name", None)
    return InvalidRequest(
        usage.format_message(), field=field, allowed="what `kelvin COMMAND --help` lists"
    )


if __name__ == "__main__":
    sys.exit(main())
