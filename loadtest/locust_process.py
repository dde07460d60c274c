"""Locust as a process of its own: it patches sockets and threads of the one that imports it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from loadtest.latencies import percentile
from loadtest.lateness import RATE, SIDE, instant_server, lateness_of
from loadtest.load_plan import LoadPlan, PlanOptions, make_plan
from loadtest.outcomes import BEGAN, OUTCOMES, Outcome, read_outcome_file
from loadtest.request_mix import PLAIN, ModelFacts
from serve.errors import ConfigurationError

_LOCUSTFILE = Path(__file__).with_name("locustfile.py")
_ROOT = _LOCUSTFILE.parents[1]
_LOOK_S = 0.2
_START_S = 60.0
_STOP_S = 10.0
_LATENESS_S = 3.0
_INSTANT = ModelFacts("instant", SIDE, SIDE, 20, 4.0, "euler", "normal", 16, SIDE, SIDE)


@dataclass(frozen=True)
class Offered:
    """What a generator left: outcomes by number, and time zero of the run by `time.time`."""

    outcomes: list[Outcome]
    began: float


def check_installed() -> None:
    """Raise ConfigurationError where locust is not there."""
    # Looked for and not imported.
    for package in ("locust", "websocket"):
        if importlib.util.find_spec(package) is None:
            raise ConfigurationError(
                f"The package {package} is not installed.",
                field="loadtest",
                value=package,
                allowed="pip install 'kelvin-serve[loadtest]', or -e '.[loadtest]' in a checkout",
            )


def offer(
    url: str,
    plan: LoadPlan,
    folder: Path,
    *,
    api_key: str | None = None,
    pictures: int = 0,
    drain_s: float = 300.0,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Offered:
    """Send a plan's requests when they are due, and return what became of them.

    Args:
        url: Of the service.
        plan: What to send.
        folder: Where outcomes, pictures and locust's own log go.
        api_key: Where the service asks for one; it goes by the environment, which ps does not show.
        pictures: How many to keep.
        drain_s: How long to wait for answers after the plan's end.
        on_progress: Called now and then with how many have their outcome.

    Raises:
        ConfigurationError: Locust is not installed, or ended before it had sent anything.
    """
    check_installed()
    plan.write(folder / "plan.json")
    for stale in (OUTCOMES, BEGAN):
        (folder / stale).unlink(missing_ok=True)
    command = [sys.executable, "-m", "locust", "-f", str(_LOCUSTFILE), "--host", url, "--headless"]
    command += ["--plan", str(folder / "plan.json"), "--folder", str(folder), "--only-summary"]
    command += ["--pictures", str(pictures)]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    environment.pop("KELVIN_API_KEY", None)
    if api_key is not None:
        environment["KELVIN_API_KEY"] = api_key
    log = folder / "locust.log"
    with log.open("w", encoding="utf-8") as said:
        # A group of its own, so that Ctrl-C reaches it through us, when its record is whole.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            _follow(process, folder, plan.duration_s + drain_s + _START_S, on_progress)
        finally:
            _end(process)
    offered = offered_in(folder)
    if offered is None:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ConfigurationError(
            "Locust ended before it had sent anything.",
            field="loadtest",
            value=lines[-1] if lines else "",
            allowed=f"what {log} says repaired",
        )
    return offered


def offered_in(folder: Path) -> Offered | None:
    """Return what a generator has left in a folder so far; None: it has not sent anything."""
    clock = folder / BEGAN
    if not clock.exists():
        return None
    return Offered(read_outcome_file(folder / OUTCOMES), float(clock.read_text(encoding="utf-8")))


@cache
def measured_lateness() -> dict[str, Any]:
    """Return the lateness of this generator at `lateness.RATE` against an instant server.

    With everything that it does with an answer: the picture is fetched, decoded and hashed. Once a
    process: it is the machine's, and no run's.
    """
    options = PlanOptions(rate=RATE, duration_s=_LATENESS_S, mix=PLAIN)
    plan = make_plan(options, _INSTANT, ("native",))
    with tempfile.TemporaryDirectory(prefix="kelvin-lateness-") as folder, instant_server() as url:
        outcomes = offer(url, plan, Path(folder)).outcomes
    answered = sorted(1000.0 * each.latency_s for each in outcomes)
    return {
        "generator": "locust",
        "rate": RATE,
        **lateness_of([each.late_s for each in outcomes]),
        "answer_p99_ms": round(percentile(answered, 0.99), 2) if answered else None,
        "failed": sum(bool(each.error) for each in outcomes),
    }


def _follow(
    process: subprocess.Popen[bytes],
    folder: Path,
    within_s: float,
    on_progress: Callable[[int], None],
) -> None:
    deadline, seen, count = time.monotonic() + within_s, 0, 0
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        if (record := folder / OUTCOMES).exists():
            with record.open("rb") as lines:
                lines.seek(seen)
                new = lines.read()
            seen, count = seen + len(new), count + new.count(b"\n")
            on_progress(count)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
