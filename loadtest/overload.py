"""Ten times as many requests as can be served: what is accepted keeps its deadline, the rest waits.

    python -m loadtest.overload --json

Starts Kelvin with `pico` on this machine and measures how many pictures a second it makes at most
(a closed loop). Then it offers ten times that for a minute, in an open loop, each with a deadline,
and looks for what may not be: an accepted job that comes late, a refusal that is no 429 with
Retry-After, a `Retry-After` that is not true (some of those refused wait so long and ask again),
processes that grow, and slow answers one deadline after it is over. The load generator runs on the
same cores; how late it was is in the report.

A short overload goes before, as a rehearsal: it is reported, and memory is judged from after it on.
On a CPU torch keeps some 10 MiB of compiled kernels for each size of batch, and which of them a
short overload meets is chance: so before all that one request comes, then two at once, three, ...
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from loadtest import command_line
from loadtest.open_loop import Answer, Body, Door, poisson
from loadtest.overhead import machine
from loadtest.overload_figures import Phase, Run, draw_run, report_of, table_of
from loadtest.process_census import processes
from loadtest.results import STDERR, Results
from serve.commands.output import stdout_is_for_json
from serve.commands.stopping import local_kelvin, stoppable
from serve.config import Settings, load_settings

_SATURATION_S = 15.0
_CALLERS = 24  # of the closed loop
_SETTLES_S = 3.0  # of it, that do not count
_REHEARSAL_S = 15.0
_USUAL_S = 15.0  # at a usual load, before and after
_USUAL_LOAD = 0.3  # of saturation
_SAMPLE_S = 1.0


class Caller:
    """Goes through the phases of one run; all of it on one event loop.

    Args:
        url: Of Kelvin.
        options: Of the command line.
        results: Where figures go as they come.
    """

    def __init__(self, url: str, options: argparse.Namespace, results: Results) -> None:
        self._options = options
        self._results = results
        self._door = Door(url, time.monotonic())
        self._draw = random.Random("who asks again")
        self._asking_again: set[asyncio.Task[None]] = set()
        self.run = Run(options.deadline_s)

    async def measure(self) -> None:
        """Measure saturation, a first overload, the usual load, the overload, and that again."""
        side = asyncio.create_task(self._sample())
        try:
            async with self._door:
                await self._all_sizes_of_batch()
                rate = await self._saturation()
                await self._offer("rehearsal", self._options.times * rate, _REHEARSAL_S)
                pause_s = self._options.deadline_s + _USUAL_S
                await self._offer("usual load", _USUAL_LOAD * rate, pause_s)
                await self._offer("overload", self._options.times * rate, self._options.seconds)
                await self._offer("usual load again", _USUAL_LOAD * rate, pause_s)
        finally:
            # Who was told to come later than this is not waited for.
            for task in (side, *self._asking_again):
                task.cancel()
            await asyncio.gather(side, *self._asking_again, return_exceptions=True)

    async def _all_sizes_of_batch(self) -> None:
        for wave in range(1, _CALLERS + 1):
            bodies = (self._body(f"wave {wave}", number) for number in range(wave))
            await asyncio.gather(*map(self._door.ask, bodies))

    async def _saturation(self) -> float:
        begin = self._door.now
        end = begin + _SATURATION_S
        answers: list[Answer] = []

        async def call(caller: int) -> None:
            number = caller
            while self._door.now < end:
                answers.append(await self._door.ask(self._body("saturation", number)))
                number += _CALLERS

        await asyncio.gather(*(call(caller) for caller in range(_CALLERS)))
        done = [each.at + each.seconds for each in answers if each.status == 200]
        rate = sum(begin + _SETTLES_S <= at < end for at in done) / (_SATURATION_S - _SETTLES_S)
        self.run.phases.append(Phase("saturation", begin, self._door.now, answers))
        self._results.keep(
            saturation={
                "jobs_per_s": round(rate, 2),
                "callers": _CALLERS,
                "not_done": sum(each.status != 200 for each in answers),
            }
        )
        return rate

    async def _offer(self, name: str, rate: float, seconds: float) -> None:
        begin = self._door.now
        times = poisson(rate, begin, begin + seconds, name)

        def body(number: int) -> Body:
            return {**self._body(name, number), "deadline_s": self._options.deadline_s}

        def seen(answer: Answer) -> None:
            if name == "overload" and answer.is_refused:
                self._perhaps_ask_again(answer)

        answers = await self._door.offer(times, body, seen)
        self.run.phases.append(Phase(name, begin, begin + seconds, answers))
        STDERR.print(f"{name}: {len(times)} requests at {rate:.1f} a second are answered")

    def _perhaps_ask_again(self, refused: Answer) -> None:
        if self._draw.random() >= self._options.ask_again:
            return
        task = asyncio.create_task(self._ask_again(refused))
        self._asking_again.add(task)
        task.add_done_callback(self._asking_again.discard)

    async def _ask_again(self, refused: Answer) -> None:
        await asyncio.sleep(refused.retry_after_s or 0.0)
        self.run.again.append((refused, await self._door.ask(refused.body or {})))

    def _body(self, phase: str, number: int) -> Body:
        steps = self._options.steps
        return {"prompt": f"{phase} {number}", "num_inference_steps": steps, "seed": number}

    async def _sample(self) -> None:
        while True:
            self.run.census.append((self._door.now, await asyncio.to_thread(processes)))
            await asyncio.sleep(_SAMPLE_S)


def settings(folder: Path) -> Settings:
    """Return the settings of a Kelvin with pico on this machine."""
    return load_settings(
        overrides={
            "model": {"path": "pico"},
            "http": {"port": 0},
            "embedded_store": {"data_dir": str(folder / "store")},
        }
    )


def measure(options: argparse.Namespace, results: Results) -> None:
    """Start Kelvin, go through all phases, and report."""
    with (
        tempfile.TemporaryDirectory(prefix="kelvin-overload-") as folder,
        local_kelvin(settings(Path(folder))) as kelvin,
    ):
        caller = Caller(kelvin.url, options, results)
        asyncio.run(caller.measure())
    results.keep(**report_of(caller.run))
    if options.plot is not None:
        draw_run(caller.run).save(options.plot)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.overload", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--out", type=command_line.file_to_write, help="file for the same JSON, as it grows")
    add("--plot", type=command_line.file_to_write, help="PNG of what was offered and answered")
    add("--times", type=command_line.number(0.1, 100), default=10.0, help="of saturation, offered")
    add("--seconds", type=command_line.number(1, 3600), default=60.0, help="of overload")
    add("--deadline-s", type=command_line.number(0.1, 600), default=5.0, help="of each request")
    add("--steps", type=command_line.whole(1, 200), default=20, help="of each request")
    add(
        "--ask-again",
        type=command_line.number(0, 1),
        default=0.02,
        help="share of those refused that wait as told and ask again",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; exit 1 if a target is missed."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


def _run(options: argparse.Namespace) -> int:
    known = {
        "command": command_line.command_of("loadtest.overload"),
        "machine": machine(),
        "times": options.times,
        "seconds": options.seconds,
        "deadline_s": options.deadline_s,
        "steps": options.steps,
    }
    with Results(known, options.out, options.json) as results, stdout_is_for_json(), stoppable():
        measure(options, results)
        STDERR.print(table_of(results.report))
    return 0 if results.report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
