"""What the blocking and the asynchronous client share: all but sending, receiving and waiting."""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
from opentelemetry import propagate
from pydantic import BaseModel, ValidationError

from serve import errors
from serve.client_errors import (
    PictureCorrupt,
    ServerUnreachable,
    UnexpectedAnswer,
    error_from_body,
)
from serve.keys import is_key, without_keys
from serve.loopback import DEFAULT_URL
from serve.requests import GenerateRequest, GenerateResult, ImageRef, JobEvent

FIRST_PAUSE_S = 0.2
PAGE = 50
"""Jobs asked for at a time."""
_RECONNECTS = 6
_CONNECT_TIMEOUT_S = 5.0

_Answer = TypeVar("_Answer", bound=BaseModel)


def checked_url(url: str) -> str:
    """Return a server's base URL without a slash at its end.

    Raises:
        InvalidRequest: It is no http URL.
    """
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        parts = httpx.URL()
    if parts.scheme not in ("http", "https") or not parts.host:
        raise errors.InvalidRequest(
            "The server's URL is not an http URL.",
            field="url",
            value=without_keys(url),
            allowed=f"e.g. {DEFAULT_URL}",
        )
    return url.rstrip("/")


def authorization(api_key: str | None) -> dict[str, str]:
    """Return the headers that show a key.

    Raises:
        InvalidRequest: It is of another form; what was given is not repeated.
    """
    if api_key is None:
        return {}
    if not is_key(api_key):
        raise errors.InvalidRequest(
            "The API key is none.", field="api_key", allowed="what `kelvin keys create` has shown"
        )
    return {"authorization": f"Bearer {api_key}"}


def timeout(timeout_s: float) -> httpx.Timeout:
    """Return the limits of one call: this long a silence, and a few seconds to connect."""
    return httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S)


def content(request: GenerateRequest) -> dict[str, Any]:
    """Return the arguments by which httpx posts a request.

    Raises:
        InvalidRequest: Before anything is sent, as through the Python handle.
    """
    # Checked again: `model_copy(update=...)` checks nothing, and on the way into JSON NaN would
    # become null, which asks for the default.
    checked = GenerateRequest.model_validate(request)
    headers = {"content-type": "application/json"}
    propagate.inject(headers)  # where the caller traces, the server's spans hang below theirs
    return {"content": checked.model_dump_json(exclude_none=True).encode(), "headers": headers}


def parsed(kind: type[_Answer], text: str | bytes) -> _Answer:
    """Return an answer as what it should be.

    Raises:
        UnexpectedAnswer: It is something else.
    """
    try:
        return kind.model_validate_json(text)
    except (ValidationError, errors.KelvinError) as error:
        raise UnexpectedAnswer(
            f"The server's {kind.__name__} cannot be read: is it another version of Kelvin?",
            value=str(error).splitlines()[0],
        ) from None


def event_in(line: str) -> JobEvent | None:
    """Return the event that a line of a stream holds; None: it holds none."""
    # Every event is one data line; event names repeat what the data says.
    if not line.startswith("data:"):
        return None
    return parsed(JobEvent, line.removeprefix("data:").strip())


def said(content: bytes) -> dict[str, Any]:
    """Return an answer that has no class of its own.

    Raises:
        UnexpectedAnswer: It is no JSON object, as where something else listens at the URL.
    """
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise UnexpectedAnswer("The server does not answer as Kelvin does: is it one?")
    return answer


def models_in(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the models that `/v1/models` tells of.

    Raises:
        UnexpectedAnswer: It tells of none.
    """
    found = answer.get("models")
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise UnexpectedAnswer("The server does not say which models it has.")
    return found


def outcome(event: JobEvent) -> GenerateResult:
    """Return the result that a job's last event tells of.

    Raises:
        JobCancelled: It was cancelled.
        KelvinError: As it failed.
    """
    if event.result is not None:
        return event.result
    if event.event == "cancelled":
        raise errors.JobCancelled("The job was cancelled.", value=event.id)
    raise error_from_body(event.error)


def no_outcome() -> UnexpectedAnswer:
    """Return the error for events that end without a last one."""
    return UnexpectedAnswer("The job's progress ended without an outcome.")


def unreachable(url: str, error: Exception) -> ServerUnreachable:
    """Return the error for a server that does not answer."""
    return ServerUnreachable(
        f"No Kelvin answers at {url} ({type(error).__name__}).",
        field="url",
        value=url,
        allowed="a running server: start one with `kelvin up`, or name one with --url",
    )


def refusal(response: httpx.Response, url: str) -> errors.KelvinError:
    """Return the typed error that an answer of 400 or more stands for; its body has been read."""
    try:
        return error_from_body(response.json())
    except (json.JSONDecodeError, UnicodeDecodeError):
        if response.status_code == errors.Overloaded.status:
            # Serve's proxy refuses in plain text what the Pipeline never sees.
            return errors.Overloaded(f"Too many calls wait at {url}.", allowed="trying again later")
        return UnexpectedAnswer(
            f"{url} answered {response.status_code}, and not as Kelvin does.",
            field="url",
            value=url,
            allowed="the URL of a Kelvin server",
        )


def picture_in(response: httpx.Response, image: ImageRef) -> bytes:
    """Return the picture that the object store answered with.

    Raises:
        StorageUnavailable: It is a refusal.
        PictureCorrupt: The bytes are not the ones the result names.
    """
    if response.status_code != 200:
        raise errors.StorageUnavailable(
            f"The picture was made, but {_origin(image)} answered {response.status_code}.",
            value=image.s3_uri,
            allowed="fetching before the presigned URL expires",
        )
    digest = hashlib.sha256(response.content).hexdigest()
    if digest != image.sha256:
        raise PictureCorrupt(
            "The picture fetched is not the picture stored.",
            field="sha256",
            value=digest,
            allowed=image.sha256,
        )
    return response.content


def picture_unreachable(image: ImageRef, error: Exception) -> errors.StorageUnavailable:
    """Return the error for an object store that does not answer."""
    return errors.StorageUnavailable(
        f"The picture was made, but {_origin(image)} did not answer: {type(error).__name__}.",
        value=image.s3_uri,
        allowed="a public_endpoint_url that this machine reaches",
    )


def _origin(image: ImageRef) -> str:
    parts = urlsplit(image.url)
    return f"{parts.scheme}://{parts.netloc}"  # the rest of a presigned URL is a secret


class Reconnecting:
    """When to open a job's event stream again, and when to give it up.

    A stream opened again tells the job from its beginning; only what goes further than any before
    it shows that the job, and not just the connection, is alive.

    Args:
        job_id: Of the job.
        first_pause_s: Before the stream is opened again; it doubles each time.
    """

    def __init__(self, job_id: str, first_pause_s: float) -> None:
        self._job_id = job_id
        self._first_pause_s = first_pause_s
        self._failures = self._furthest = 0

    def saw(self, place: int) -> None:
        """Note an event, the first of its stream being 1."""
        if place > self._furthest:
            self._furthest, self._failures = place, 0

    def pause_s(self, broke: ServerUnreachable | None) -> float:
        """Return how long to wait after a stream has ended before the job did.

        Args:
            broke: How; None: as if all had been told.

        Raises:
            KelvinError: It has ended too often.
        """
        if self._failures >= _RECONNECTS:
            raise broke or UnexpectedAnswer(
                "The job's progress stream keeps ending before the job does.", value=self._job_id
            )
        self._failures += 1
        return self._first_pause_s * 2.0 ** (self._failures - 1)
