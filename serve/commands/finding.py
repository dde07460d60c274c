"""One line of what `kelvin doctor` finds, and how a table of them looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

Verdict = Literal["ok", "warning", "failed"]
_STYLES: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "failed": "bold red"}


@dataclass(frozen=True)
class Finding:
    """What one check found. `remedy` says what to do and is empty where nothing is wrong.

    `figures` are for programs: in the JSON, not in the table.
    """

    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""
    figures: Mapping[str, Any] | None = None

    def body(self) -> dict[str, Any]:
        """Return the finding as JSON."""
        body = asdict(self)
        if self.figures is None:
            del body["figures"]
        return body

    def line(self) -> Text:
        """Return the finding as one line for a terminal, remedy included."""
        text = Text()
        text.append(f"{self.verdict:<8}", style=_STYLES[self.verdict])
        text.append(f"{self.name}: {self.detail}")
        if self.remedy:
            text.append(f"\n        -> {self.remedy}", style="bold")
        return text


def table_of(findings: Sequence[Finding]) -> Table:
    """Return findings as a table, each remedy beneath what it repairs."""
    table = Table(show_lines=False, pad_edge=False)
    for heading in ("check", "", "found"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        found = Text(finding.detail)
        if finding.remedy:
            found.append(f"\n-> {finding.remedy}", style="bold")
        table.add_row(finding.name, Text(finding.verdict, _STYLES[finding.verdict]), found)
    return table
