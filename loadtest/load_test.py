"""One load test from beginning to end: plan, unloaded latency, load, verdicts, page and JSON."""

from __future__ import annotations

import json
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from loadtest.load_charts import charts_of
from loadtest.load_figures import LoadRun, figures_of, is_sound
from loadtest.load_plan import LoadPlan, PlanOptions, make_plan
from loadtest.locust_process import (
    Offered,
    check_installed,
    measured_lateness,
    offer,
    offered_in,
)
from loadtest.outcomes import KEPT_PICTURES, OUTCOMES, PICTURES
from loadtest.overhead import machine
from loadtest.picture_verdicts import MOST_JUDGED, judge
from loadtest.profiles import LONGEST_S
from loadtest.prompt_set import is_built_in, prompts_for
from loadtest.report_page import page
from loadtest.request_mix import ModelFacts
from loadtest.service_facts import doors_for, model_facts
from loadtest.status_log import StatusLog
from serve.client import Kelvin
from serve.errors import InvalidRequest
from serve.keys import without_keys
from serve.requests import GenerateRequest

SLO_FACTOR = 3.0
_UNLOADED = 3
_SHOWN = 24
REPORT_HTML, REPORT_JSON = "report.html", "report.json"


@dataclass(frozen=True)
class LoadTest:
    """What to do.

    Attributes:
        url: Of the service.
        options: Of the plan.
        folder: For the report and all that it is made of.
        api_key: Where the service asks for one.
        slo_s: What counts as in time; `SLO_FACTOR` times the unloaded latency if absent.
        say: Told what is being done.
        on_progress: Told how many of how many requests have their outcome.
    """

    url: str
    options: PlanOptions
    folder: Path
    api_key: str | None = None
    slo_s: float | None = None
    say: Callable[[str], None] = field(default=lambda _: None)
    on_progress: Callable[[int, int], None] = field(default=lambda *_: None)

    def run(self) -> dict[str, Any]:
        """Run it, write page and JSON, and return what the JSON holds.

        Interrupted while requests are sent or awaited, it reports on those that were due until then
        and says so under `interrupted_at_s`; before that, or a second time, it is given up.

        Raises:
            InvalidRequest: An option is wrong; before anything is sent.
            KelvinError: The service is not reached, or refuses what is not yet load.
        """
        check_installed()
        check_slo(self.slo_s)
        with Kelvin(self.url, api_key=self.api_key) as client:
            model = model_facts(client)
            doors, note = doors_for(self.options.door, client)
            plan = make_plan(self.options, model, doors)
            _prepare(self.folder)
            self.say("Measuring the generator against a server that answers at once ...")
            generator = measured_lateness()
            slo_s, slo_words = self.slo_s, "as given"
            if slo_s is None:
                self.say("Measuring the latency without load ...")
                unloaded_s = _unloaded_s(client, model)
                slo_s = SLO_FACTOR * unloaded_s
                slo_words = f"{SLO_FACTOR:g} times the {unloaded_s:.3g} s without load"
        self.say(f"Sending {len(plan.asks)} requests in {plan.duration_s:g} s ...")
        with StatusLog(self.url, self.api_key) as log:
            offered, interrupted_at_s = self._offered(plan, model)
        notes = [note] if note else []
        if interrupted_at_s is not None:
            notes.append(
                f"Interrupted after {interrupted_at_s:.3g} s of {plan.duration_s:g}. What was "
                "under way then counts as unheard."
            )
            self.say("Interrupted; reporting on what was measured ...")
            plan = plan.until(interrupted_at_s)
        load = LoadRun(plan, offered.outcomes, log.samples, offered.began, slo_s)
        figures = figures_of(load)
        figures["status_problem"] = log.problem
        kept = [
            (plan.asks[each.number].request["prompt"], self.folder / PICTURES / each.picture)
            for each in offered.outcomes
            if each.picture
        ]
        if is_built_in(model.name):
            self.say("Looking at the pictures ...")
            figures["adherence"] = judge(kept)
        report = {
            "run": self._about(plan, model, doors, slo_words, notes)
            | {"interrupted_at_s": interrupted_at_s},
            "generator": generator,
            "figures": figures,
            "ok": is_sound(figures) and interrupted_at_s is None,
        }
        every = max(1, len(kept) // _SHOWN)
        html = page(report, charts_of(load), kept[::every][:_SHOWN])
        (self.folder / REPORT_HTML).write_text(html, encoding="utf-8")
        (self.folder / REPORT_JSON).write_text(json.dumps(report, indent=1), encoding="utf-8")
        return report

    def _offered(self, plan: LoadPlan, model: ModelFacts) -> tuple[Offered, float | None]:
        """Send the plan; return what came, and at what second it was interrupted, if so."""
        try:
            offered = offer(
                self.url,
                plan,
                self.folder,
                api_key=self.api_key,
                pictures=MOST_JUDGED if is_built_in(model.name) else _SHOWN,
                on_progress=lambda count: self.on_progress(count, len(plan.asks)),
            )
        except KeyboardInterrupt:
            so_far, now = offered_in(self.folder), time.time()
            if so_far is None or not so_far.outcomes:
                raise
            return so_far, round(now - so_far.began, 3)
        return offered, None

    def _about(
        self,
        plan: LoadPlan,
        model: ModelFacts,
        doors: tuple[str, ...],
        slo_words: str,
        notes: list[str],
    ) -> dict[str, Any]:
        options = self.options
        return {
            "command": _told_command(sys.argv[1:]),
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "machine": machine(),
            "model": model.name,
            "profile": options.profile,
            "rate": options.rate if options.trace is None else None,
            "duration_s": plan.duration_s,
            "requests": len(plan.asks),
            "doors": list(doors),
            "mix": options.mix,
            "prompts": options.prompts or prompts_for(model.name),
            "trace": None if options.trace is None else str(options.trace),
            "seed": options.seed,
            "slo_words": slo_words,
            "notes": notes,
        }


def check_slo(slo_s: Any) -> None:
    """Raise InvalidRequest where this is not a time within which a picture can be; None is."""
    if slo_s is not None and not (isinstance(slo_s, int | float) and 0 < slo_s <= LONGEST_S):
        raise InvalidRequest(
            "The SLO is no time.",
            field="slo_s",
            value=slo_s,
            allowed=f"seconds above 0, at most {LONGEST_S:g}",
        )


def _told_command(arguments: Sequence[str]) -> str:
    """Return a command line as it can be typed again, without what a report must not tell."""
    told = without_keys(shlex.join(["kelvin", *arguments]))
    return re.sub(r"(https?://)[^/\s@]+@", r"\1***@", told)


def _prepare(folder: Path) -> None:
    pictures = folder / PICTURES
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        # Of an earlier run, and nothing that somebody keeps in a folder of that name.
        stale = pictures.glob(KEPT_PICTURES) if (folder / OUTCOMES).exists() else ()
        for each in stale:
            each.unlink()
    except OSError as error:
        raise InvalidRequest(
            f"The report's folder cannot be made: {error.strerror}.",
            field="out",
            value=str(folder),
            allowed="a folder, new or not, that can be written",
        ) from None


def _unloaded_s(client: Kelvin, model: ModelFacts) -> float:
    """Return the median latency of the model's usual picture, one at a time, fetched."""
    seconds = []
    for number in range(_UNLOADED + 1):
        began = time.monotonic()
        result = client.generate(
            GenerateRequest(prompt="a red circle", seed=number, model=model.name)
        )
        client.download(result.images[0])
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds[1:])  # the first one may find things cold
