"""A report that grows phase by phase: an interrupted run keeps what it measured."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console

STDERR = Console(stderr=True)


class Results:
    """Holds a report; writes it whole after every phase and once more at the end.

    A context: on the way out, whatever ended it, the report goes to standard output if asked for.
    SIGTERM (a time limit's, say) ends the run as an exception would.

    Args:
        report: What is known before anything is measured.
        out: File that holds the report so far, or None.
        to_stdout: Whether to print it at the end.
    """

    def __init__(self, report: dict[str, Any], out: Path | None, to_stdout: bool) -> None:
        self.report = report | {"complete": False}
        self.out = out
        self.to_stdout = to_stdout

    def keep(self, **phase: Any) -> None:
        """Add what a phase measured, and say so on standard error."""
        self.report |= phase
        for name, value in phase.items():
            _say(name, value)
        self._write()

    def keep_part(self, phase: str, name: str, value: Any) -> None:
        """Add one part of a phase that has several, and say so on standard error."""
        self.report.setdefault(phase, {})[name] = value
        _say(f"{phase}, {name}", value)
        self._write()

    def __enter__(self) -> Results:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _leave)
        self._write()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.report["complete"] = True
        else:
            self.report["ended_by"] = f"{type(error).__name__}: {error}"
        self._write()
        if self.to_stdout:
            print(json.dumps(self.report, default=str), flush=True)  # machines read it

    def _write(self) -> None:
        if self.out is None:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_name(self.out.name + ".part")
        part.write_text(json.dumps(self.report, default=str, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.out)


def _say(name: str, value: Any) -> None:
    words = json.dumps(value, default=str)
    STDERR.print(f"{name}: {words}", highlight=False, markup=False, soft_wrap=True)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
