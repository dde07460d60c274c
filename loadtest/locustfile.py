r"""Locust users for all doors of a Kelvin, as an open loop over a plan that is made beforehand.

    kelvin loadtest --profile burst --duration 120              # this, with a report
    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --headless \
        --arrivals burst --rate 2 --duration 120 --door mixed    # locust alone

An open loop has no number of users that could be chosen: one user stands for all callers of its
door, `--users` and `--spawn-rate` are not used, and one process sends everything in time up to some
hundred requests a second (`python -m loadtest.lateness`). For more, start several with different
`--plan-seed`. An API key is taken from the environment, `KELVIN_API_KEY`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from locust import LoadTestShape, events

from loadtest.load_plan import DOORS, LoadPlan, PlanOptions
from loadtest.profiles import NAMES
from loadtest.request_mix import MIXES, VARIED
from loadtest.service_facts import plan_for
from loadtest.users.comfyui import ComfyUIUser
from loadtest.users.handle import HandleUser
from loadtest.users.native import NativeUser
from loadtest.users.open_loop_user import API_KEY
from loadtest.users.openai import OpenAIUser
from loadtest.users.run import Run
from serve.errors import KelvinError

__all__ = ["ComfyUIUser", "HandleUser", "NativeUser", "OpenAIUser", "UntilAnswered"]

_ALL = (NativeUser, OpenAIUser, ComfyUIUser, HandleUser)


@events.init_command_line_parser.add_listener
def _add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("Kelvin").add_argument
    add("--plan", type=Path, help="JSON of a plan, instead of the options below")
    add("--arrivals", choices=NAMES, default="steady", help="the profile: how they come")
    add("--rate", type=float, default=1.0, help="mean requests a second")
    add("--duration", type=float, default=None, help="seconds in which requests come")
    add("--door", choices=DOORS, default="native")
    add("--mix", choices=MIXES, default=VARIED)
    add("--prompts", default=None, help="scenes, general, or a file with one a line")
    add("--trace", type=Path, default=None, help="CSV of --arrivals replay")
    add("--plan-seed", type=int, default=0)
    add("--folder", type=Path, default=None, help="for outcomes.jsonl and pictures")
    add("--pictures", type=int, default=0, help="how many to keep, evenly over the run")


@events.init.add_listener
def _plan(environment: Any, **_: Any) -> None:
    options = environment.parsed_options
    if options.master or options.worker or options.processes:
        sys.exit("Each process sends a whole plan: start several with different --plan-seed.")
    try:
        if options.plan is not None:
            plan = LoadPlan.read(options.plan)
        else:
            wanted = PlanOptions(
                options.arrivals,
                options.rate,
                options.duration,
                options.door,
                options.mix,
                options.prompts,
                options.trace,
                options.plan_seed,
            )
            plan = plan_for(environment.host or "", wanted, os.environ.get(API_KEY))
    except KelvinError as error:
        words = [error.message]
        if error.field is not None:
            words.append(f"{error.field}: {error.value!r}; allowed: {error.allowed}")
        sys.exit(" ".join(words))
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kelvin-locust-"))
    environment.run_of_plan = Run(plan, folder, options.pictures)
    doors = {ask.door for ask in plan.asks}
    environment.user_classes = [each for each in _ALL if each.door in doors]


class UntilAnswered(LoadTestShape):
    """Keeps every user until each request has its outcome."""

    def tick(self) -> tuple[int, float] | None:
        """Return how many users there are to be; None: the run is over."""
        runner = self.runner
        if runner is None:
            return 1, 1.0
        run: Run = runner.environment.run_of_plan
        return None if run.is_over else (len(runner.user_classes), 100.0)
