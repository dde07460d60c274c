"""Typed errors: what went wrong, where, and what would have been right.

Every front door answers with the same body, made here once; the Python handle raises the same
classes.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ValidationError

_LONGEST_VALUE_SHOWN = 200
_LONGEST_MESSAGE = 4000  # it may quote what was sent
_LONGEST_INTEGER_BITS = 256


class KelvinError(Exception):
    """Base of every error a caller may see.

    Args:
        message: One sentence for a person.
        field: Name of the offending field, dotted if nested.
        value: The value that was sent; shown shortened.
        allowed: What would have been right, in words.
        retry_after_s: Seconds after which the same may work, where that is known.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        value: Any = None,
        allowed: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        self.retry_after_s = retry_after_s
        self.message = _shorten_text(message, _LONGEST_MESSAGE)
        super().__init__(self.message)
        self.field = None if field is None else _shorten_text(field)
        self.value = _shorten(value)
        self.allowed = None if allowed is None else _encodable(allowed)

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions with keyword-only arguments need help to cross process boundaries.
        told = (self.message, self.field, self.value, self.allowed, self.retry_after_s)
        return _rebuild, (type(self), *told)

    def body(self) -> dict[str, Any]:
        """Return the JSON body that every route answers with."""
        # Through a handle, Ray raises a subclass it made itself; its name is nobody's business.
        kind = next(cls for cls in type(self).__mro__ if "code" in vars(cls))
        return {
            "error": {
                "type": kind.__name__,
                "code": self.code,
                "message": self.message,
                "field": self.field,
                "value": self.value,
                "allowed": self.allowed,
            }
        }


class InvalidRequest(KelvinError):
    """A field is missing, malformed, out of range or unknown."""

    status = 400
    code = "invalid_request"

    @classmethod
    def unknown_field(cls, name: str, value: Any, allowed: dict[str, str]) -> InvalidRequest:
        """Return the error for a field that there is not.

        Args:
            name: Of it, as it was sent.
            value: Of it.
            allowed: Names of the fields that there are, as keys.
        """
        field = _shorten_text(name)
        known = "one of: " + ", ".join(sorted(allowed))
        return cls(f"Unknown field {field!r}.", field=field, value=value, allowed=known)

    @classmethod
    def from_validation(cls, error: ValidationError, allowed: dict[str, str]) -> InvalidRequest:
        """Translate pydantic's first complaint.

        Args:
            error: What pydantic raised.
            allowed: Field name -> what is allowed there, in words.
        """
        first = error.errors(include_url=False)[0]
        # A field's name is the caller's too, where the field is unknown.
        field = (
            _shorten_text(".".join(str(part) for part in first["loc"])) if first["loc"] else None
        )
        if first["type"] == "extra_forbidden":
            return cls.unknown_field(str(field), first["input"], allowed)
        if first["type"] == "missing":
            # Of a list that is too short, the list is what was sent.
            in_list = isinstance(first["loc"][-1], int)
            message, value = (
                f"Field {field!r} is required.",
                list(first["input"]) if in_list else None,
            )
        else:
            subject = "The request" if field is None else f"Field {field!r}"
            message, value = f"{subject}: {first['msg']}.", first["input"]
        right = allowed.get(str(first["loc"][0])) if first["loc"] else "a JSON object"
        return cls(message, field=field, value=value, allowed=right)


class NotSupportedYet(KelvinError):
    """A field that is reserved: understood, but not built yet."""

    status = 400
    code = "not_supported_yet"


class PayloadTooLarge(KelvinError):
    """The request body is larger than the front door takes."""

    status = 413
    code = "payload_too_large"


class BodyTooSlow(KelvinError):
    """The request body takes too long to arrive."""

    status = 408
    code = "body_too_slow"


class UnsupportedMediaType(KelvinError):
    """A content type is present and is not JSON."""

    status = 415
    code = "unsupported_media_type"


class Unauthenticated(KelvinError):
    """The request needs an API key, and has none or a wrong one."""

    status = 401
    code = "unauthenticated"


class Forbidden(KelvinError):
    """The API key does not allow this."""

    status = 403
    code = "forbidden"


class ForeignOrigin(KelvinError):
    """A browser sends this for a page from elsewhere, or under a name that is not ours."""

    status = 403
    code = "foreign_origin"


class KeyNotFound(KelvinError):
    """No API key has this id."""

    status = 404
    code = "key_not_found"


class ModelNotFound(InvalidRequest):
    """No model of that name is served here, or not any more."""

    status = 404
    code = "model_not_found"


class ModelLoading(KelvinError):
    """The model is being loaded; try again later."""

    status = 503
    code = "model_loading"


class ModelConflict(KelvinError):
    """The model is in a state that does not allow this."""

    status = 409
    code = "model_conflict"


class JobNotFound(KelvinError):
    """No job of that id was ever accepted here."""

    status = 404
    code = "job_not_found"


class JobConflict(KelvinError):
    """The job is in a state that does not allow this."""

    status = 409
    code = "job_conflict"


class IdempotencyConflict(KelvinError):
    """Another request was sent under the same idempotency key."""

    status = 409
    code = "idempotency_conflict"


class JobCancelled(KelvinError):
    """The job was cancelled by its owner before it finished."""

    status = 409
    code = "job_cancelled"


class Overloaded(KelvinError):
    """Too much work is waiting; try again later."""

    status = 429
    code = "overloaded"


class LimitReached(Overloaded):
    """The tenant has reached one of its limits; Retry-After says when it may go on."""

    status = 429
    code = "limit_reached"


class StorageUnavailable(KelvinError):
    """The object store does not answer, or refuses what Kelvin needs of it."""

    status = 503
    code = "storage_unavailable"


class RecordUnreadable(KelvinError):
    """A record in the journal was written by somebody else, or by another version of Kelvin."""

    status = 500
    code = "record_unreadable"


class StageUnavailable(KelvinError):
    """A stage died or cannot be reached, and retrying did not help."""

    status = 503
    code = "stage_unavailable"


class StageFailed(KelvinError):
    """A stage failed on this request; another try would fail the same way."""

    status = 500
    code = "stage_failed"


class DeadlineExceeded(KelvinError):
    """The request's deadline passed, or cannot be met any more; the work was given up."""

    status = 504
    code = "deadline_exceeded"


class ConfigurationError(KelvinError):
    """Settings, a model folder or the machine do not fit together; raised at start-up."""

    status = 500
    code = "configuration_error"


def _rebuild(
    cls: type[KelvinError],
    message: str,
    field: str | None,
    value: Any,
    allowed: str | None,
    retry_after_s: float | None,
) -> KelvinError:
    return cls(message, field=field, value=value, allowed=allowed, retry_after_s=retry_after_s)


def _shorten(value: Any) -> Any:
    """Return a JSON-able value, with long text cut so that an error never echoes a huge body."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        # Python refuses to write an integer of thousands of digits.
        bits = value.bit_length()
        return value if bits <= _LONGEST_INTEGER_BITS else f"an integer of {bits} bits"
    if isinstance(value, float):
        # NaN and infinity are not JSON.
        return value if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, str):
        return _shorten_text(value)
    try:
        return _shorten_text(repr(value))
    except Exception:  # whatever a stranger's object raises, too deep a nesting included
        return f"a {type(value).__name__}"


def _shorten_text(text: str, longest: int = _LONGEST_VALUE_SHOWN) -> str:
    # Cut first: what is sent may be megabytes.
    cut = _encodable(text[: longest + 1])
    return cut if len(cut) <= longest else cut[:longest] + "…"


def _encodable(text: str) -> str:
    """Return the text with lone surrogates spelt out: JSON may name them, UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode()
