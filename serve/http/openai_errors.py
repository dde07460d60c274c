"""An error as OpenAI's clients read it, in their names of fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from serve.errors import KelvinError

_WORDS: Final = {
    "num_images": "n",
    "width": "size",
    "height": "size",
}
_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def openai_body(error: KelvinError, words: Mapping[str, str] = _WORDS) -> dict[str, Any]:
    """Return the body of an error: OpenAI's message, type, param and code, then Kelvin's fields.

    Args:
        error: Any.
        words: What the door calls fields of the contract.
    """
    told = error.body()["error"]
    message, field = told["message"], told["field"]
    ours, dot, rest = (field or "").partition(".")
    if ours in words:
        field = words[ours] + dot + rest
        message = message.replace(f"'{ours}'", f"'{words[ours]}'")
    remedy = f" Allowed: {told['allowed']}." if told["allowed"] else ""
    by_status = "invalid_request_error" if error.status < 500 else "server_error"
    return {
        "error": {
            "message": message + remedy,
            "type": _TYPES.get(error.status, by_status),
            "param": field,
            "code": told["code"],
            "field": field,
            "value": told["value"],
            "allowed": told["allowed"],
        }
    }


def openai_edit_body(error: KelvinError) -> dict[str, Any]:
    """Return the body of an error of `/v1/images/edits`, where the start image is `image`."""
    return openai_body(error, {**_WORDS, "init_image": "image"})
