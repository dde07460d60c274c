"""What only a caller over HTTP can meet, and the server's errors made from their bodies again."""

from __future__ import annotations

from typing import Any, Final

from serve import errors


class ServerUnreachable(errors.KelvinError):
    """No Kelvin answers at the URL."""

    status = 503
    code = "server_unreachable"


class UnexpectedAnswer(errors.KelvinError):
    """Something answered, but not as Kelvin does."""

    status = 502
    code = "unexpected_answer"


class PictureCorrupt(errors.KelvinError):
    """The bytes fetched are not the bytes the result names."""

    status = 502
    code = "picture_corrupt"


# What a body may name; anything else becomes the plain base class.
_TYPES: Final[dict[str, type[errors.KelvinError]]] = {
    kind.__name__: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.KelvinError)
}


def error_from_body(body: Any) -> errors.KelvinError:
    """Return the error that `KelvinError.body()` was made of, of the class it names."""
    told = body.get("error") if isinstance(body, dict) else None
    if not isinstance(told, dict):
        return UnexpectedAnswer("The server reported a failure, and not as Kelvin does.")
    kind = _TYPES.get(str(told.get("type")), errors.KelvinError)
    return kind(
        str(told.get("message", "The server gave no reason.")),
        field=told.get("field"),
        value=told.get("value"),
        allowed=told.get("allowed"),
    )
