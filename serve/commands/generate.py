"""`kelvin generate`: one prompt to a running Kelvin, its pictures into files."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.commands.output import EXIT_OK, console, write_json
from serve.commands.previews import PreviewFiles
from serve.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serve.requests import GenerateRequest, GenerateResult, JobEvent

_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_EXTENSIONS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}


def generate(
    *,
    url: str,
    given: Mapping[str, Any],
    output: Path | None,
    remake: Path | None,
    as_json: bool,
    api_key: str | None = None,
) -> int:
    """Make pictures and save them; print their paths, or one JSON object.

    Args:
        url: Base URL of the server.
        given: Fields of the contract that were given; absent ones are not in it.
        output: File to write, replacing it; named after the job if None.
        remake: A picture made by Kelvin whose request is sent again, under `given`.
        as_json: Print one JSON object on stdout instead of paths.
        api_key: Where the server asks for one.

    Raises:
        KelvinError: Bad input, no server, or a failed job.
    """
    from serve.client import Kelvin

    request = request_from(given, output=output, remake=remake)
    with Kelvin(url, api_key=api_key) as client:
        with progress_bar() as show:
            previews = PreviewFiles(output, request.num_images)

            def on_event(event: JobEvent) -> None:
                previews.save(event)
                show(event)

            result = client.generate(request, on_event)
        files = save(result, output, client.download)
    for warning in result.warnings:
        console().print(f"[yellow]Warning:[/] {warning}", soft_wrap=True)
    if as_json:
        write_json({**result.model_dump(mode="json"), "files": [str(file) for file in files]})
    else:
        for file in files:
            print(file)
    return EXIT_OK


def request_from(
    given: Mapping[str, Any], *, output: Path | None = None, remake: Path | None = None
) -> GenerateRequest:
    """Return the request that the options describe.

    The output's suffix chooses the picture format where no format is given.

    Raises:
        InvalidRequest: An option is wrong, or the output's suffix is not of the picture's format.
    """
    from serve.requests import GenerateRequest

    fields: dict[str, Any] = {}
    if remake is not None:
        from serve.pictures import read_request

        fields = read_request(remake, given.get("prompt")).model_dump(exclude_none=True)
    fields.update(given)
    if "init_image" in given:
        fields["init_image"] = start_image(given["init_image"])
    suffix_format = _FORMATS.get(output.suffix.lower()) if output is not None else None
    if output is not None:
        if suffix_format is None:
            raise InvalidRequest(
                "The output file's suffix names no picture format.",
                field="output",
                value=str(output),
                allowed=f"a name that ends in one of: {', '.join(_FORMATS)}",
            )
        fields = {**fields, "output_format": given.get("output_format", suffix_format)}
    request = GenerateRequest(**{"prompt": "", **fields})
    if output is not None:
        if suffix_format != request.output_format:
            raise InvalidRequest(
                f"The output file's suffix does not fit the format {request.output_format}.",
                field="output",
                value=str(output),
                allowed=f"a name that ends in {_EXTENSIONS[request.output_format]}",
            )
        # Found out now rather than after the picture was paid for.
        if output.is_dir() or not output.parent.is_dir():
            raise InvalidRequest(
                "The output file cannot be written there.",
                field="output",
                value=str(output),
                allowed="a file name in a folder that exists",
            )
    return request


def start_image(source: str) -> str:
    """Return a file's content as the contract takes it; an s3:// URI stays as it is.

    Raises:
        InvalidRequest: There is no such file.
    """
    if source.startswith("s3://"):
        return source
    try:
        return base64.b64encode(Path(source).read_bytes()).decode("ascii")
    except OSError as error:
        raise InvalidRequest(
            f"The start image cannot be read: {error.strerror}.",
            field="init_image",
            value=source,
            allowed="a PNG, JPEG or WebP file, or the s3:// URI of a picture of yours",
        ) from None


def save(
    result: GenerateResult, output: Path | None, download: Callable[[Any], bytes]
) -> list[Path]:
    """Write a result's pictures; several of them become out-0.png, out-1.png, ...

    Raises:
        InvalidRequest: A file cannot be written.
        KelvinError: A picture cannot be fetched.
    """
    files = []
    for image in result.images:
        file = output or Path(f"kelvin-{result.id}{_EXTENSIONS[image.output_format]}")
        if len(result.images) > 1:
            file = file.with_stem(f"{file.stem}-{image.index}")
        data = download(image)
        try:
            file.write_bytes(data)
        except OSError as error:
            raise InvalidRequest(
                f"The output file cannot be written: {error.strerror}.",
                field="output",
                value=str(file),
                allowed=f"a file that can be written; the picture is kept at {image.s3_uri}",
            ) from error
        files.append(file)
    return files


@contextmanager
def progress_bar() -> Iterator[Callable[[JobEvent], None]]:
    """Yield what draws a job's events as a bar of real steps on stderr, if that is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console(),
        disable=not console().is_terminal,
    ) as progress:
        task = progress.add_task("waiting", total=None)
        finished: dict[int, int] = {}  # picture index -> steps finished; pictures may interleave
        totals: dict[int, int] = {}

        def show(event: JobEvent) -> None:
            doing = {"queued": "waiting", "text": "denoising", "decode": "decoding"}
            if event.event == "step":
                picture = event.image or 0
                finished[picture] = event.step or 0
                totals[picture] = event.steps or 0
                progress.update(
                    task,
                    description="denoising",
                    completed=sum(finished.values()),
                    total=sum(totals.values()),
                )
            else:
                progress.update(task, description=doing.get(event.event, event.event))

        yield show
