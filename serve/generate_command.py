"""`kelvin generate`: what its options mean. What it does is in `serve.commands.generate`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from serve.command_options import ApiKey, Json, Url, integer, number
from serve.loopback import DEFAULT_URL


def pair(text: str) -> Any:
    """Return what "low,high" may mean: the contract judges it."""
    return [number(part) for part in text.strip().removeprefix("[").removesuffix("]").split(",")]


def _loras(text: str) -> Any:
    choices: list[dict[str, Any]] = []
    for part in text.split(","):
        name, _, weight = part.strip().rpartition(":")
        choices.append({"name": name, "weight": number(weight)} if name else {"name": weight})
    return choices


_KINDS: dict[Any, str] = {
    integer: "INTEGER",
    number: "NUMBER",
    pair: "LOW,HIGH",
    _loras: "NAMES",
}


def _field(*names: str, parser: Callable[[str], Any] | None = None, **about: Any) -> Any:
    """Return an option that fills one field of the contract."""
    kind = "TEXT" if parser is None else _KINDS[parser]
    about.setdefault("rich_help_panel", "Picture")
    return typer.Option(*names, parser=parser, metavar=kind, **about)


def generate(
    prompt: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write; its suffix chooses the format."),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    remake: Annotated[
        Path | None,
        typer.Option("--from", help="Make this picture again; other options change it."),
    ] = None,
    prompt_2: Annotated[Any, _field("--prompt-2", help="For CLIP-G alone.")] = None,
    prompt_3: Annotated[Any, _field("--prompt-3", help="For T5 alone.")] = None,
    negative_prompt: Annotated[
        Any, _field("--negative-prompt", help="What to keep out of the picture.")
    ] = None,
    negative_prompt_2: Annotated[Any, _field("--negative-prompt-2", hidden=True)] = None,
    negative_prompt_3: Annotated[Any, _field("--negative-prompt-3", hidden=True)] = None,
    width: Annotated[Any, _field(parser=integer, help="Pixels, a multiple of 16.")] = None,
    height: Annotated[Any, _field(parser=integer, help="Pixels, a multiple of 16.")] = None,
    num_inference_steps: Annotated[
        Any, _field("--num-inference-steps", "--steps", parser=integer, help="1 to 200.")
    ] = None,
    guidance_scale: Annotated[
        Any, _field("--guidance-scale", parser=number, help="0 to 100; 1 is without guidance.")
    ] = None,
    guidance_interval: Annotated[
        Any,
        _field("--guidance-interval", parser=pair, help="Guide at these noise levels, 0 to 1."),
    ] = None,
    negative_prompt_range: Annotated[
        Any,
        _field(
            "--negative-prompt-range",
            parser=pair,
            help="Share of sampling with the negative prompt, 0 to 1.",
        ),
    ] = None,
    sampler: Annotated[
        Any, _field(help="euler, euler_ancestral, dpmpp_2m or dpmpp_2m_sde.")
    ] = None,
    scheduler: Annotated[Any, _field(help="normal, simple, sgm_uniform or beta.")] = None,
    shift: Annotated[Any, _field(parser=number, help="Timestep shift.")] = None,
    max_sequence_length: Annotated[
        Any, _field("--max-sequence-length", parser=integer, help="T5 tokens.")
    ] = None,
    loras: Annotated[
        Any,
        _field("--loras", parser=_loras, help="LoRAs with their weights, as ink:0.8,grain."),
    ] = None,
    init_image: Annotated[
        Any,
        _field(
            "--init-image",
            help="Start from this picture: a file, or the s3:// URI of one of yours.",
        ),
    ] = None,
    strength: Annotated[
        Any, _field(parser=number, help="Of --init-image: how far to leave it, up to 1.")
    ] = None,
    seed: Annotated[Any, _field(parser=integer, help="Drawn anew if absent.")] = None,
    num_images: Annotated[
        Any, _field("--num-images", parser=integer, help="1 to 16: out-0.png, out-1.png, ...")
    ] = None,
    output_format: Annotated[
        Any, _field("--format", "--output-format", help="png, jpeg or webp.")
    ] = None,
    quality: Annotated[Any, _field(parser=integer, help="Of jpeg and webp, 1 to 100.")] = None,
    model: Annotated[Any, _field(help="A model the server has.")] = None,
    embed_prompt: Annotated[
        bool | None,
        typer.Option(
            "--embed-prompt/--no-embed-prompt",
            help="Write the prompts into the file's metadata.",
            # A panel of its own: a name with a --no- widens every row of its panel, and at 80
            # columns that cut other names short.
            rich_help_panel="File",
        ),
    ] = None,
    priority: Annotated[
        Any,
        _field(parser=integer, help="-10 to 10; higher goes first.", rich_help_panel="When"),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        _field(
            "--idempotency-key",
            help="The same request under the same key is the same job.",
            rich_help_panel="When",
        ),
    ] = None,
    deadline_s: Annotated[
        Any,
        _field(
            "--deadline-s",
            "--deadline",
            parser=number,
            help="Seconds after which it is given up.",
            rich_help_panel="When",
        ),
    ] = None,
    preview_every: Annotated[
        Any,
        _field(
            "--preview-every",
            parser=integer,
            help="Steps between previews, written beside the output as .preview.jpg.",
            rich_help_panel="When",
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Send one prompt to a running Kelvin and save its pictures.

    What an option leaves out is the model's own default.
    """
    from serve.commands.generate import generate as run

    options = dict(locals())
    for name in ("output", "url", "api_key", "remake", "as_json", "run", "prompt"):
        options.pop(name)
    given = {name: value for name, value in options.items() if value is not None}
    if prompt:
        given["prompt"] = " ".join(prompt)
    return run(url=url, given=given, output=output, remake=remake, as_json=as_json, api_key=api_key)
