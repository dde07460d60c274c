"""The OpenAPI document: what every operation may answer beside its success is said once, here.

The gate, the router and typed errors answer on each route with the body of its door
(`serve.http.error_shapes`), so no route has to declare that by itself.
"""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI

from serve.errors import KelvinError
from serve.http.error_shapes import error_body

_FAILURES: Final = {
    "4XX": "the request cannot be taken, and why",
    "5XX": "a stage or the store failed",
}
# FastAPI's own, which no route answers: `serve.http.errors` does.
_NEVER: Final = "422"


class DocumentedApp(FastAPI):
    """A FastAPI whose document tells of failures."""

    def openapi(self) -> dict[str, Any]:
        """Return the document."""
        document = super().openapi()
        for path, methods in document["paths"].items():
            failure = _schema_of(error_body(KelvinError(""), {"path": path}))
            for operation in methods.values():
                answers = operation["responses"]
                answers.pop(_NEVER, None)
                for status, description in _FAILURES.items():
                    content = {"application/json": {"schema": failure}}
                    answers.setdefault(status, {"description": description, "content": content})
        return document


def _schema_of(body: Any) -> dict[str, Any]:
    """Return a schema of bodies like this one: what is empty here may be anything."""
    if isinstance(body, dict) and body:
        return {
            "type": "object",
            "properties": {name: _schema_of(value) for name, value in body.items()},
            "required": list(body),
        }
    return {"type": "string"} if isinstance(body, str) else {}
