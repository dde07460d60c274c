"""The shape of an error's body at each door: clients look where their own service put it.

A door that has a shape of its own is entered here with the prefix of its routes; every other route
answers with `KelvinError.body()`. Whoever notices the error, the gate and the router included, the
body is the door's.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, Final

from serve.errors import KelvinError
from serve.http.a1111_errors import web_ui_body
from serve.http.comfyui_errors import comfyui_body
from serve.http.openai_errors import openai_body, openai_edit_body

ErrorShape = Callable[[KelvinError], dict[str, Any]]

_COMFYUI = (
    "/api/",
    "/prompt",
    "/history",
    "/queue",
    "/interrupt",
    "/view",
    "/upload/",
    "/object_info",
    "/system_stats",
    "/models",
    "/free",
    "/embeddings",
    "/extensions",
    "/features",
    "/ws",
)
_SHAPES: Final[tuple[tuple[str, ErrorShape], ...]] = (
    ("/sdapi/", web_ui_body),
    *((prefix, comfyui_body) for prefix in _COMFYUI),
    ("/v1/images/edits", openai_edit_body),
    ("/v1/images/", openai_body),
    ("/v1/models/", openai_body),
)


def error_body(error: KelvinError, scope: MutableMapping[str, Any]) -> dict[str, Any]:
    """Return the body of an error's answer.

    Args:
        error: Any.
        scope: ASGI's, of the request that failed; a key in its path has been taken out.
    """
    path = inner_path(scope)
    shape = next((shape for prefix, shape in _SHAPES if path.startswith(prefix)), KelvinError.body)
    return shape(error)


def inner_path(scope: MutableMapping[str, Any]) -> str:
    """Return the path of a request below where the app is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"
