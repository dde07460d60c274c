"""One Kelvin, in a process of its own, whose telemetry can be turned off and on while it runs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtest.telemetry_collector import Collector, collector
from loadtest.telemetry_switch import Switch, new_switch
from serve.client import Kelvin
from serve.requests import GenerateRequest

_PROMPT = "a red circle"


@dataclass(frozen=True)
class Subject:
    """What pictures are made, and how many at once.

    Attributes:
        model: `builtin`, `pico` or a folder.
        steps: Of each. The more of a picture is its model, the less can be seen of what is not; a
            step costs telemetry three notes, which are counted elsewhere.
        side: pixels; None: the model's own.
        on_card: Whether all stages are on a card, or none is.
        callers: That fill the machine.
        pictures: Between two turns of the switch, under load.
    """

    model: str
    steps: int
    side: int | None = None
    on_card: bool = False
    callers: int = 4
    pictures: int = 12

    def request(self, seed: int) -> GenerateRequest:
        """Return one picture's."""
        return GenerateRequest(
            prompt=_PROMPT,
            num_inference_steps=self.steps,
            seed=seed,
            width=self.side,
            height=self.side,
        )


@dataclass(frozen=True)
class Service:
    """The service that is measured.

    Attributes:
        url: Of its front doors.
        pid: Of its process; Ray's and the store's are beneath it.
        switch: Of its telemetry.
        subject: Of every picture.
    """

    url: str
    pid: int
    switch: Switch
    subject: Subject

    def picture(self, client: Kelvin, seed: int) -> None:
        """Make one."""
        client.generate(self.subject.request(seed))


@contextmanager
def serving(subject: Subject) -> Iterator[tuple[Service, Collector]]:
    """Start one; it listens, its collector too.

    Raises:
        RuntimeError: It does not start.
    """
    with (
        collector() as sink,
        tempfile.TemporaryDirectory(prefix="kelvin-cost-") as folder,
    ):
        file = Path(folder) / "switch"
        switch = new_switch(file)
        command = [sys.executable, "-m", "loadtest.telemetry_arm", "--model", subject.model]
        command += ["--data-dir", f"{folder}/store", "--switch", str(file)]
        command += ["--otlp-endpoint", sink.endpoint]
        if subject.on_card:
            command += ["--on-card", "--side", str(subject.side)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            if process.stdin is None or process.stdout is None:
                raise RuntimeError("a pipe that was asked for is not there")
            try:
                first = process.stdout.readline()
                if not first:
                    raise RuntimeError(f"the service of {subject.model} does not start")
                url = str(json.loads(first)["url"])
                yield Service(url, process.pid, switch, subject), sink
            finally:
                process.stdin.close()
                process.wait(60)
