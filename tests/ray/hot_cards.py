"""Rehearsed cards for a real Ray: a script of their heat that a test rewrites, and steady work."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import yaml

# Of 10 ms, which a forward of pico does not exceed; slept, so that three cards share two cores.
USUAL_SLOWDOWN = 12.0
_COOL = {"temperature_c": 45, "limit_c": 85, "power_w": 300, "slowdown": USUAL_SLOWDOWN}


class HeatScript:
    """What the denoisers' cards seem to read; cool at first."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "heat.yaml"
        self.set()

    def set(self, **hot: Any) -> None:
        """Let the first replica's card be different from the others; as cool as they if empty."""
        part = self.path.with_suffix(".part")
        part.write_text(yaml.safe_dump({"replicas": [_COOL | hot], "default": _COOL}))
        os.replace(part, self.path)  # never half of it


class SteadyWork:
    """Sends requests at even intervals and keeps what came of them; a context."""

    def __init__(self, url: str, request: dict[str, Any], every_s: float) -> None:
        self._url = url
        self._request = request
        self.every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.answers: list[tuple[int, str]] = []  # status and text

    def __enter__(self) -> SteadyWork:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def failures(self) -> list[tuple[int, str]]:
        return [answer for answer in self.answers if answer[0] != 200]

    def _run(self) -> None:
        due = time.monotonic()
        with (
            httpx.Client(base_url=self._url, timeout=120, trust_env=False) as http,
            ThreadPoolExecutor(32) as senders,
        ):
            while not self._stop.wait(max(due - time.monotonic(), 0.0)):
                senders.submit(self._send, http)
                due += self.every_s

    def _send(self, http: httpx.Client) -> None:
        try:
            answer = http.post("/v1/generate", json=self._request)
        except httpx.HTTPError as error:
            self.answers.append((0, str(error)))
        else:
            self.answers.append((answer.status_code, answer.text))
