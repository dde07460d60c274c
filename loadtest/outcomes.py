"""What became of each request of a load test: one JSON object a line, written as they end."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

OUTCOMES = "outcomes.jsonl"
BEGAN = "began"
PICTURES = "pictures"
"""Names in a run's folder."""
KEPT_PICTURES = "[0-9]" * 6 + ".png"
"""What the files in `PICTURES` match."""


@dataclass(frozen=True)
class Outcome:
    """One request.

    Attributes:
        number: Of the request in its plan.
        door: It went through.
        at: When it was due, in seconds of the run.
        late_s: By how much it was sent later.
        latency_s: From when it was due until its picture was here, or its failure known. Counted
            from then and not from when it was sent, so that neither a queue in front of the service
            nor a generator that lags can hide ("coordinated omission").
        error: Code of the typed error, or what was wrong; empty for a picture that is right.
        status: Of HTTP; 0 without an answer.
        job_id: Of the job, where known.
        server_s: From acceptance to published, by the service's own clock.
        queue_s: Waited inside replicas, all stages together.
        joules: Of denoising, where the card counts them.
        replica: That denoised it.
        picture: Name of the file that holds the picture, of those that were kept.
    """

    number: int
    door: str
    at: float
    late_s: float
    latency_s: float
    error: str = ""
    status: int = 200
    job_id: str | None = None
    server_s: float | None = None
    queue_s: float | None = None
    joules: float | None = None
    replica: str | None = None
    picture: str | None = None


def write_outcome(outcome: Outcome, file: IO[str]) -> None:
    """Append one outcome, so that it is there whatever ends the run."""
    file.write(json.dumps(asdict(outcome)) + "\n")
    file.flush()


def read_outcomes(lines: Iterable[str]) -> list[Outcome]:
    """Return what was written, by number; a last line that was cut off is left out."""
    outcomes = []
    for line in lines:
        if line.endswith("\n"):
            outcomes.append(Outcome(**json.loads(line)))
    return sorted(outcomes, key=lambda outcome: outcome.number)


def read_outcome_file(path: Path) -> list[Outcome]:
    """Return the outcomes in a file; none where the run wrote none."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:
        return read_outcomes(lines)
