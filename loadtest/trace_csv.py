"""A recorded load as CSV: when each request came, and what of it is known.

    at_s,prompt,width,height,num_inference_steps
    0.0,a red circle,256,256,20
    0.4,,,,

Only `at_s` is required: seconds from the first row's zero, not falling. What a row leaves empty is
drawn from the run's mix, as is every field without a column.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtest.profiles import LONGEST_S
from serve.errors import InvalidRequest
from serve.requests import GenerateRequest

_FIELDS: Mapping[str, type] = {
    "prompt": str,
    "negative_prompt": str,
    "width": int,
    "height": int,
    "num_inference_steps": int,
    "guidance_scale": float,
    "seed": int,
}
_COLUMNS = ("at_s", *_FIELDS)
MOST_ROWS = 1_000_000


@dataclass(frozen=True)
class Recorded:
    """One row: when it is due, in seconds, and the fields of the contract that it states."""

    at: float
    fields: dict[str, Any] = field(default_factory=dict)


def read_trace(path: Path) -> list[Recorded]:
    """Return a trace's rows.

    Raises:
        InvalidRequest: The file cannot be read, or what row and column are wrong, and why.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            columns = _columns(next(reader, []))
            rows: list[Recorded] = []
            for values in reader:
                if not values:
                    continue
                rows.append(_row(columns, values, reader.line_num, rows[-1].at if rows else 0.0))
                if len(rows) > MOST_ROWS:
                    raise _wrong("", len(rows), f"at most {MOST_ROWS} rows", reader.line_num)
    except OSError as error:
        raise InvalidRequest(
            f"The trace cannot be read: {error.strerror}.",
            field="trace",
            value=str(path),
            allowed="a CSV file",
        ) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"The trace is not CSV in UTF-8: {error}.",
            field="trace",
            value=str(path),
            allowed=f"CSV whose first line names its columns: {', '.join(_COLUMNS)}",
        ) from None
    if not rows:
        raise InvalidRequest(
            "The trace has no rows.", field="trace", value=str(path), allowed="at least one row"
        )
    return rows


def _columns(header: list[str]) -> list[str]:
    columns = [each.strip() for each in header]
    unknown = [each for each in columns if each not in _COLUMNS]
    if unknown or "at_s" not in columns or len(set(columns)) != len(columns):
        raise InvalidRequest(
            "The trace's first line does not name its columns.",
            field="trace",
            value=",".join(unknown or columns),
            allowed=f"at_s, and any of {', '.join(_FIELDS)}; each once",
        )
    return columns


def _row(columns: list[str], values: list[str], line: int, earliest: float) -> Recorded:
    if len(values) != len(columns):
        raise _wrong("", len(values), f"{len(columns)} values, as the first line says", line)
    at, fields = math.nan, {}
    for column, text in zip(columns, (each.strip() for each in values), strict=True):
        if column == "at_s":
            at = _seconds(text, earliest, line)
        elif text:
            fields[column] = _value(column, text, line)
    if fields:
        try:
            GenerateRequest(**{"prompt": "a row", **fields})
        except InvalidRequest as error:
            raise _wrong(error.field or "", error.value, error.allowed or "", line) from None
    return Recorded(at, fields)


def _seconds(text: str, earliest: float, line: int) -> float:
    try:
        at = float(text)
    except ValueError:
        at = math.nan
    if not earliest <= at <= LONGEST_S:
        allowed = f"seconds, at most {LONGEST_S:g}, not before the row above ({earliest:g})"
        raise _wrong("at_s", text, allowed, line)
    return at


def _value(column: str, text: str, line: int) -> Any:
    try:
        return _FIELDS[column](text)
    except ValueError:
        allowed = GenerateRequest.allowed()[column]
        raise _wrong(column, text, allowed, line) from None


def _wrong(column: str, value: Any, allowed: str, line: int) -> InvalidRequest:
    place = f"line {line}, column {column}" if column else f"line {line}"
    return InvalidRequest(
        f"The trace is wrong in {place}.",
        field=f"trace.{column}" if column else "trace",
        value=value,
        allowed=allowed,
    )
