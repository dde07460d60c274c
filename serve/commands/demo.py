"""`kelvin demo`: everything on this machine, one picture, looked at by the checker, and stop."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.commands.generate import progress_bar, request_from, save
from serve.commands.output import EXIT_INTERRUPTED, EXIT_OK, console, stdout_is_for_json, write_json
from serve.commands.stopping import Stop, end_process, local_kelvin, stoppable
from serve.config import Settings
from serve.errors import InvalidRequest
from serve.model_dir import resolve_model_dir

if TYPE_CHECKING:
    from deployments.builtin.claims import Claims


def demo(prompt: str, output: Path, seed: Any, *, as_json: bool) -> int:
    """Make one picture with the built-in model and say whether it shows what was asked.

    Returns:
        0 when the picture was made and stored, whatever it shows: the adherence says that.

    Raises:
        InvalidRequest: The prompt is outside of what the built-in model knows.
        ConfigurationError: The built-in weights are missing.
    """
    try:
        with stdout_is_for_json() as stdout, stoppable():
            summary = draw_once(prompt, output, seed)
            if as_json:
                write_json(summary, stdout)
            else:
                print(output, file=stdout, flush=True)
    except Stop:
        console().print("Interrupted.")
        end_process(EXIT_INTERRUPTED)
    return EXIT_OK


def draw_once(prompt: str, output: Path, seed: Any) -> dict[str, Any]:
    """Start Kelvin, draw one picture, stop Kelvin, and return what `--json` prints."""
    started = time.monotonic()
    out = console()
    claims = claims_of(prompt)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(
            f"The output folder cannot be made: {error.strerror}.",
            field="output",
            value=str(output),
            allowed="a file name in a folder that can be written",
        ) from None
    request = request_from({"prompt": prompt, "seed": seed}, output=output)
    from serve.client import Kelvin

    # Its own port and its own data, and nothing from the environment, so that a demo never meets
    # a Kelvin or a store that is in use.
    settings = Settings.model_validate(
        {
            "model": {"path": "builtin"},
            "http": {"host": "127.0.0.1", "port": 0},
            "embedded_store": {"enabled": True, "data_dir": str(output.parent / "demo-data")},
        }
    )
    resolve_model_dir(settings.model)  # says what is missing before a minute of starting
    out.print("Starting Ray, three stages and an S3 server on this machine ...")
    with local_kelvin(settings) as kelvin, Kelvin(kelvin.url) as client:
        out.print(f'Drawing "{prompt}" ...')
        with progress_bar() as show:
            result = client.generate(request, show)
        (file,) = save(result, output, client.download)
    (image,) = result.images
    adherence = look_at(file, claims)
    summary = {
        "s3_uri": image.s3_uri,
        "url": image.url,
        "file": str(file.absolute()),
        "prompt": prompt,
        "adherence": adherence,
        "seconds": round(time.monotonic() - started, 3),
    }
    wrong = [name for name, right in adherence.items() if not right]
    out.print(
        f"[yellow]The checker misses: {', '.join(wrong)}[/]"
        if wrong
        else "The checker sees everything that the prompt states."
    )
    out.print(f"[green]Saved[/] {file}; stored at {image.s3_uri}", soft_wrap=True)
    return summary


def claims_of(prompt: str) -> Claims:
    """Return what a prompt states, in terms the checker can look for.

    Raises:
        InvalidRequest: The prompt is outside of what the built-in model knows.
    """
    from deployments.builtin.read import PromptError, read_claims

    try:
        return read_claims(prompt)
    except PromptError as error:
        raise InvalidRequest(
            f"The demo's checker {error}.",
            field="prompt",
            value=prompt,
            allowed='shapes, colours, sizes and places, e.g. "a large red circle left of a small '
            'blue square"; `kelvin up` takes any prompt',
        ) from None


def look_at(file: Path, claims: Claims) -> dict[str, bool]:
    """Return for each stated attribute whether the picture shows it, and `all_right`."""
    import numpy as np
    from PIL import Image

    from deployments.builtin.checker import check

    with Image.open(file) as picture:
        verdict = check(np.asarray(picture.convert("RGB")), claims)
    return {**verdict.attributes, "all_right": verdict.all_right}
