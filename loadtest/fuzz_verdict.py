"""What may never be in an answer: a 500, the insides of the server, another shape of error.

What a caller sent may come back, as the offending value of an error does; so a path counts as the
server's own only where the request did not hold it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from serve.errors import KelvinError
from serve.http.error_shapes import error_body

_INSIDES: Final = re.compile(
    r"Traceback \(most recent call last\)"
    r"|File \\?\"[^\"]+\", line \d+"
    r"|\b(?:site|dist)-packages\b"
    r"|\b\w+\.py\b"
    r"|0x[0-9a-f]{8,}"
    r"|(?<![\w:/.*-])/(?:app|data|dev|etc|home|mnt|opt|private|proc|root|srv|tmp|usr|var|work|"
    r"workspace|Users)/[\w.@-]+"
)


def insides(text: str, sent: str = "") -> list[str]:
    """Return what a text tells of the server's insides: stacks, source files, paths, addresses.

    Args:
        text: Body, or headers, of an answer.
        sent: All that the caller sent; what is in it is an echo.
    """
    return sorted({found[0] for found in _INSIDES.finditer(text) if found[0] not in sent})


def faults(
    status: int,
    headers: Mapping[str, str],
    body: str,
    *,
    method: str,
    path: str,
    sent: str = "",
    is_report: bool = False,
) -> list[str]:
    """Return what is wrong with an HTTP answer, whatever was asked.

    Args:
        status: Of it.
        headers: Of it.
        body: As text; bytes that are no UTF-8 replaced.
        method: That was sent.
        path: That was sent, without query.
        sent: All that was sent, as text.
        is_report: Whether the document has a schema of its own for this status, as `/readyz` does.
    """
    found = []
    if status == 500:
        found.append("it answered 500")
    told = "\n".join([*(f"{name}: {value}" for name, value in headers.items()), body])
    found += [f"it tells of its insides: {each}" for each in insides(told, sent)]
    if status >= 400 and method != "HEAD" and not is_report:
        found += shape_faults(body, path)
    return found


def shape_faults(body: str, path: str) -> list[str]:
    """Return what is wrong with the body of an error; each door has one shape.

    Args:
        body: Of the answer.
        path: That was asked, which tells the door.
    """
    try:
        told = json.loads(body)
    except ValueError:
        return ["the error is no JSON"]
    # An error's own class makes the shape that this door is to have.
    right = error_body(KelvinError("x"), {"path": path})
    if _keys(told) != _keys(right):
        return [f"the error has the fields {_keys(told)}, not {_keys(right)}"]
    return []


def handle_faults(error: BaseException) -> list[str]:
    """Return what is wrong with what a call by handle raised."""
    if not isinstance(error, KelvinError):
        return [f"it raised {type(error).__name__}, which is none of Kelvin's errors"]
    found = ["it raised an internal error"] if error.status == 500 else []
    # Values are the caller's.
    told = f"{error.body()['error'] | {'value': None}}"
    return found + [f"it tells of its insides: {each}" for each in insides(told)]


def _keys(value: Any) -> list[str]:
    if not isinstance(value, dict):
        return [type(value).__name__]
    nested = [
        f"{name}.{key}"
        for name, inner in value.items()
        if isinstance(inner, dict)
        for key in inner
        if name == "error"
    ]
    return sorted([*value, *nested])
