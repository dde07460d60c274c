"""`kelvin loadtest`: load on a running Kelvin, or on one that is started for it, and the report."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from serve.commands.output import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    console,
    stdout_is_for_json,
    write_json,
)
from serve.errors import InvalidRequest
from serve.loopback import DEFAULT_URL


@dataclass(frozen=True)
class Asked:
    """The command line; numbers as they were typed."""

    profile: str
    rate: Any
    duration_s: Any
    door: str
    mix: str
    prompts: str | None
    trace: Path | None
    seed: Any
    url: str | None
    api_key: str | None
    start: bool
    model: str | None
    slo_s: Any
    require: Any
    out: Path
    as_json: bool


def loadtest(asked: Asked) -> int:
    """Run it; print where the report is, or all of its JSON.

    Returns:
        0, or 1 if a picture was wrong or lost, or fewer were in time than `require`; 130 if it was
        interrupted, whatever was measured until then.

    Raises:
        InvalidRequest: An option is wrong.
        KelvinError: There is no Kelvin, or it refuses what is not yet load.
    """
    from loadtest.locust_process import check_installed

    _check(asked)
    check_installed()
    return _with_own_kelvin(asked) if asked.start else _with_running_kelvin(asked)


def _with_running_kelvin(asked: Asked) -> int:
    from serve.commands.stopping import Stop, stoppable

    try:
        # SIGTERM too must end the generator, which is a process of its own.
        with stoppable():
            return _told(asked, _run(asked, asked.url or DEFAULT_URL))
    except Stop:
        console().print("Interrupted.")
        return EXIT_INTERRUPTED


def _with_own_kelvin(asked: Asked) -> int:
    from serve.commands.overrides import settings_from_options
    from serve.commands.stopping import Stop, end_process, local_kelvin, stoppable

    settings = settings_from_options(None, (), model=asked.model, port=0)
    code = EXIT_INTERRUPTED
    try:
        with (
            stdout_is_for_json() as stdout,
            stoppable(),
            tempfile.TemporaryDirectory(prefix="kelvin-loadtest-") as folder,
        ):
            store = settings.embedded_store.model_copy(update={"data_dir": folder})
            settings = settings.model_copy(update={"embedded_store": store})
            console().print("Starting Ray, three stages and an S3 server on this machine ...")
            with local_kelvin(settings) as kelvin:
                report = _run(asked, kelvin.url)
            code = _told(asked, report, stdout)
    except Stop:
        console().print("Interrupted.")
    end_process(code)


def _check(asked: Asked) -> None:
    if asked.start and asked.url is not None:
        raise InvalidRequest(
            "A server is named, and one is to be started.",
            field="url",
            value=asked.url,
            allowed="--url or --start, not both",
        )
    if asked.model is not None and not asked.start:
        raise InvalidRequest(
            "A running server has its model already.",
            field="model",
            value=asked.model,
            allowed="with --start",
        )
    if asked.require is not None and not (
        isinstance(asked.require, float) and 0 <= asked.require <= 1
    ):
        raise InvalidRequest(
            "The share is out of range.",
            field="require",
            value=asked.require,
            allowed="a number from 0 to 1",
        )
    from loadtest.load_test import check_slo

    check_slo(asked.slo_s)
    _options(asked).check()


def _options(asked: Asked) -> Any:
    from loadtest.load_plan import PlanOptions

    return PlanOptions(
        asked.profile,
        asked.rate,
        asked.duration_s,
        asked.door,
        asked.mix,
        asked.prompts,
        asked.trace,
        asked.seed,
    )


def _run(asked: Asked, url: str) -> dict[str, Any]:
    from loadtest.load_test import LoadTest

    with _bar() as on_progress:
        test = LoadTest(
            url=url,
            options=_options(asked),
            folder=asked.out,
            api_key=asked.api_key,
            slo_s=asked.slo_s,
            say=lambda words: console().print(words, soft_wrap=True),
            on_progress=on_progress,
        )
        return test.run()


def _told(asked: Asked, report: dict[str, Any], stdout: Any = None) -> int:
    from loadtest.load_test import REPORT_HTML
    from loadtest.report_words import findings, tiles

    table = Table(show_header=False)
    for tile in tiles(report):
        table.add_row(tile.name, f"{tile.value} {tile.unit}".strip(), tile.words)
    console().print(table)
    for finding in findings(report):
        console().print(f"[yellow]{finding}[/]", soft_wrap=True)
    file = asked.out / REPORT_HTML
    if asked.as_json:
        write_json({**report, "report": str(file.absolute())}, stdout)
    else:
        print(file, file=stdout)
    if report["run"]["interrupted_at_s"] is not None:
        return EXIT_INTERRUPTED
    attainment = report["figures"]["slo"]["attainment"]
    missed = asked.require is not None and attainment < asked.require
    return EXIT_OK if report["ok"] and not missed else EXIT_FAILED


@contextmanager
def _bar() -> Iterator[Any]:
    """Yield what draws how many requests have ended, if stderr is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    out = console()
    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=out,
        disable=not out.is_terminal,
    ) as progress:
        task = progress.add_task("answered", total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)
