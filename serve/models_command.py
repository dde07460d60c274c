"""`kelvin models ...`: what the options mean; what they do is in `serve.commands.models`."""

from pathlib import Path
from typing import Annotated

import typer

from serve.command_options import ApiKey, Json, ModelsDir, Url
from serve.loopback import DEFAULT_URL

_MODELS_EXAMPLES = """
[bold]Examples[/]

kelvin models list [dim]# names for `kelvin generate --model`, and their state[/]

kelvin models load /models/stable-diffusion-3.5-medium --set denoiser.num_gpus=0.5

kelvin models load sd3.5_medium.safetensors --models-dir ComfyUI/models --name medium

kelvin models unload medium [dim]# once its jobs are done; the others notice nothing[/]

load and unload go through Ray, not HTTP: run them on the machine of `kelvin up`, or where
RAY_ADDRESS leads to the cluster.
"""

models_app = typer.Typer(
    name="models",
    help="The models of a running service: list them, load one beside them, unload one.",
    epilog=_MODELS_EXAMPLES,
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@models_app.command("list")
def models_list(url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: Json = False) -> int:
    """Show every model: its name, whether it takes requests, its defaults."""
    from serve.commands.models import list_models

    return list_models(url, as_json=as_json, api_key=api_key)


@models_app.command("load")
def models_load(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="pico, a folder in Diffusers layout, or a .safetensors file."
        ),
    ] = None,
    models_dir: ModelsDir = None,
    name: Annotated[
        str | None, typer.Option(help="What requests say in `model`; the folder's own if absent.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="YAML file: one element of the settings' `models`."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SETTING=VALUE", help="As denoiser.num_gpus=1; repeatable."),
    ] = None,
    wait_s: Annotated[
        float, typer.Option("--wait-s", min=0, help="Seconds to wait; it goes on loading then.")
    ] = 1800.0,
    as_json: Json = False,
) -> int:
    """Load a model beside the others, with denoisers of its own; nothing restarts.

    Text encoders and VAE are shared with the service where the files are the same. Pools that are
    not given are like the service's own.
    """
    from serve.commands.models import load

    return load(
        model=model,
        models_dir=models_dir,
        name=name,
        config=config,
        assignments=assignments or (),
        wait_s=wait_s,
        as_json=as_json,
    )


@models_app.command("unload")
def models_unload(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `kelvin models list` shows it.")],
    wait_s: Annotated[
        float,
        typer.Option(
            "--wait-s", min=0, help="Seconds for its jobs to end; it stays if they don't."
        ),
    ] = 600.0,
    as_json: Json = False,
) -> int:
    """Refuse new requests for a model, let its jobs end, and free its replicas."""
    from serve.commands.models import unload

    return unload(name, wait_s, as_json=as_json)
