"""What was tried and what was wrong, kept while a fuzz runs and shown as it goes."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from loadtest.results import STDERR

_SAID_EVERY_S = 5.0
_KEPT_A_FAULT = 3


@dataclass
class Tally:
    """Counts cases; the same fault of one operation is kept a few times.

    Attributes:
        wanted: How many cases there are to be.
        jobs: Ids of accepted jobs, for later cases.
    """

    wanted: int
    quiet: bool = False
    jobs: list[str] = field(default_factory=list)
    cases: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    answers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    faults: list[dict[str, Any]] = field(default_factory=list)
    faulty_cases: int = 0
    began: float = field(default_factory=time.monotonic)
    _seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    _said_at: float = field(default_factory=time.monotonic)

    def count(self, kind: str, operation: str, answer: str) -> None:
        """Note one case and how it was answered: a status, or an error's code."""
        self.cases += 1
        self.by_kind[kind] += 1
        self.answers[operation][answer] += 1
        if not self.quiet and time.monotonic() - self._said_at > _SAID_EVERY_S:
            self._said_at = time.monotonic()
            STDERR.print(
                f"{self.cases} of {self.wanted} cases, {self.faulty_cases} faulty, "
                f"{self.seconds:.0f} s: {operation}",
                highlight=False,
                markup=False,
            )

    def blame(self, operation: str, found: list[str], **where: Any) -> None:
        """Note what was wrong with a case, and how to send it again."""
        self.faulty_cases += bool(found)
        for each in found:
            self._seen[operation, each] += 1
            if self._seen[operation, each] <= _KEPT_A_FAULT:
                self.faults.append({"operation": operation, "fault": each, **where})

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def report(self) -> dict[str, Any]:
        """Return it for JSON."""
        answers = Counter[str]()
        for counted in self.answers.values():
            answers.update(counted)
        return {
            "cases": self.cases,
            "by_kind": dict(self.by_kind),
            "answers": dict(sorted(answers.items())),
            "by_operation": {
                name: dict(sorted(counted.items()))
                for name, counted in sorted(self.answers.items())
            },
            "faulty_cases": self.faulty_cases,
            "faults": self.faults,
            "seconds": round(self.seconds, 1),
        }

    def table(self) -> Table:
        """Return it for people: one row an operation."""
        shown = Table(title=f"{self.cases} cases in {self.seconds:.0f} s")
        for heading in ("operation", "cases", "answers", "faults"):
            shown.add_column(heading, overflow="fold")
        blamed = Counter[str]()
        for (operation, _), times in self._seen.items():
            blamed[operation] += times
        for name, counted in sorted(self.answers.items()):
            told = ", ".join(f"{answer}: {times}" for answer, times in sorted(counted.items()))
            shown.add_row(name, str(counted.total()), told, str(blamed[name]))
        return shown
