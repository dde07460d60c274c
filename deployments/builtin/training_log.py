"""One JSON object a line: what a training run reports, readable while it runs and afterwards."""

import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any


class TrainingLog:
    """Appends records to ``log.jsonl`` and prints them.

    Args:
        path: of the file.
        began: ``time.monotonic()`` at the start of the run; records carry seconds since then.
        echo: whether to print records too.
    """

    def __init__(self, path: Path, began: float | None = None, *, echo: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self.echo = echo
        self.began = time.monotonic() if began is None else began

    def write(self, event: str, **fields: Any) -> None:
        """Record one event with its fields; floats are rounded to five digits."""
        rounded = {
            key: float(f"{value:.5g}") if isinstance(value, float) else value
            for key, value in fields.items()
        }
        elapsed = round(time.monotonic() - self.began, 1)
        line = json.dumps({"t": elapsed, "event": event, **rounded})
        self._file.write(line + "\n")
        self._file.flush()
        if self.echo:
            print(line, flush=True)  # a training script talks to its terminal


class StopRequest:
    """Set by SIGTERM or SIGINT: the loop ends at the next step and still saves its work."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            sys.exit(128 + number)
        self.asked = True


class Budget:
    """Progress of a loop that is bounded by steps or by seconds.

    Args:
        steps: bound in steps, or None.
        seconds: bound in seconds, used when ``steps`` is None.
        spent_seconds: seconds that an earlier, resumed run took.
    """

    def __init__(self, steps: int | None, seconds: float, spent_seconds: float = 0.0) -> None:
        self.steps, self.seconds = steps, seconds
        self._began = time.monotonic() - spent_seconds

    @property
    def elapsed_seconds(self) -> float:
        """Seconds in the loop, earlier runs included."""
        return time.monotonic() - self._began

    def progress(self, step: int) -> float:
        """From 0 at the start to 1 when the budget is spent."""
        done = step / self.steps if self.steps else self.elapsed_seconds / self.seconds
        return min(done, 1.0)
