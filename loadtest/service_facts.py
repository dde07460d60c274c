"""What a load test must know of a service before it can plan: its model, and which doors there are.

All of it is asked in this process before any load, so that what cannot work is said at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from loadtest.load_plan import HANDLE, HTTP_DOORS, MIXED, LoadPlan, PlanOptions, make_plan
from loadtest.request_mix import ModelFacts
from serve.client import Kelvin
from serve.client_errors import UnexpectedAnswer
from serve.errors import ConfigurationError, KelvinError

_PROBE_S = 30.0


def model_facts(client: Kelvin) -> ModelFacts:
    """Return the facts of a service's own model.

    Raises:
        KelvinError: It is not reached, or it is no Kelvin, or one that refuses the key.
    """
    for told in client.models():
        if told.get("is_own"):
            try:
                return ModelFacts.of(told)
            except (KeyError, TypeError) as error:
                raise UnexpectedAnswer(f"/v1/models does not tell {error} of its model.") from None
    raise UnexpectedAnswer("/v1/models tells of no model of the service's own.")


def doors_for(door: str, client: Kelvin) -> tuple[tuple[str, ...], str]:
    """Return the doors that requests go through, and what is to be said of one left out.

    Args:
        door: As asked for.
        client: Of the service.

    Raises:
        ConfigurationError: Only the handle was asked for, and it cannot be had.
    """
    if door in HTTP_DOORS:
        return (door,), ""
    problem = _handle_problem(client)
    if door == HANDLE:
        if problem:
            raise ConfigurationError(
                f"The service's Ray Serve handle cannot be had here: {problem}.",
                field="door",
                value=door,
                allowed="the URL of a Kelvin on the Ray that RAY_ADDRESS names or that runs on "
                f"this machine; or one of {', '.join((*HTTP_DOORS, MIXED))}",
            )
        return (HANDLE,), ""
    if problem:
        return HTTP_DOORS, f"The handle user was skipped: {problem}."
    return (*HTTP_DOORS, HANDLE), ""


def plan_for(url: str, options: PlanOptions, api_key: str | None = None) -> LoadPlan:
    """Return the plan of a run against the service at a URL; raises as its parts do."""
    options.check()
    with Kelvin(url, api_key=api_key) as client:
        return make_plan(options, model_facts(client), doors_for(options.door, client)[0])


def _handle_problem(client: Kelvin) -> str:
    """Return why the handle of this very service cannot be had; empty: it can."""
    command = [sys.executable, "-m", "loadtest.handle_caller", "--probe"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PROBE_S, check=False)
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        return "the Ray on this machine does not answer"
    if "problem" in told:
        return f"no Ray is reachable ({told['problem']})"
    try:
        # The Ray that is found may be another service's. No two keep their jobs in one place.
        own = client.status()["storage"]
    except KelvinError as error:
        return f"whose handle it is cannot be told ({error.message})"
    return "" if own == told["store"] else "the Ray that was found serves another Kelvin"
