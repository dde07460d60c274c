"""A small HTTP client of the native API: submit, follow, fetch; the same typed errors.

It holds a job's id, not a connection: when the progress stream breaks it asks again, because an
accepted job lives in the object store and not in the process that took it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, ValidationError

from serve import errors
from serve.client_errors import (
    PictureCorrupt,
    ServerUnreachable,
    UnexpectedAnswer,
    error_from_body,
)
from serve.keys import is_key, without_keys
from serve.loopback import is_loopback
from serve.requests import GenerateRequest, GenerateResult, ImageRef, JobEvent, JobRecord

DEFAULT_URL = "http://127.0.0.1:8000"
_RECONNECTS = 6
_FIRST_PAUSE_S = 0.2
_CONNECT_TIMEOUT_S = 5.0

_Answer = TypeVar("_Answer", bound=BaseModel)


class KelvinClient:
    """Speaks to one Kelvin; a context manager.

    Args:
        url: Base URL of the server.
        api_key: Where the server asks for one; it goes there and nowhere else.
        timeout_s: Longest silence accepted on any one answer or progress stream.
        first_pause_s: Pause before a progress stream is opened again; it doubles each time.

    Raises:
        ServerUnreachable: From any method, when nothing answers.
        KelvinError: The typed error the server sent, as the Python handle would raise it.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 300.0,
        first_pause_s: float = _FIRST_PAUSE_S,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise errors.InvalidRequest(
                "The server's URL is not an http URL.",
                field="url",
                value=without_keys(url),
                allowed=f"e.g. {DEFAULT_URL}",
            )
        base = url.rstrip("/")
        self.url = without_keys(base)
        self._first_pause_s = first_pause_s
        self._timeout = httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S)
        self._http = httpx.Client(
            base_url=base,
            headers=_authorization(api_key),
            timeout=self._timeout,
            trust_env=not is_loopback(url),
        )

    def __enter__(self) -> KelvinClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def submit(self, request: GenerateRequest) -> JobRecord:
        """Post a job; it is durable once this returns.

        Raises:
            InvalidRequest: Before anything is sent, as through the Python handle.
        """
        # Checked again: `model_copy(update=...)` checks nothing, and on the way into JSON NaN would
        # become null, which asks for the default.
        return self._record("POST", "/v1/jobs", GenerateRequest.model_validate(request))

    def job(self, job_id: str) -> JobRecord:
        """Return what is known of a job."""
        return self._record("GET", f"/v1/jobs/{job_id}")

    def cancel(self, job_id: str) -> JobRecord:
        """Ask that a job stop at its next step."""
        return self._record("DELETE", f"/v1/jobs/{job_id}")

    def delete(self, job_id: str) -> JobRecord:
        """Delete a job with its pictures, ended or not; return what it was."""
        return self._record("DELETE", f"/v1/jobs/{job_id}?purge=true")

    def status(self) -> dict[str, Any]:
        """Return the service's own account of itself."""
        answer: dict[str, Any] = self._call("GET", "/v1/status").json()
        return answer

    def models(self) -> list[dict[str, Any]]:
        """Return every model of the service, with its state, defaults and limits."""
        answer = self._call("GET", "/v1/models").json()
        found = answer.get("models") if isinstance(answer, dict) else None
        if not isinstance(found, list):
            raise UnexpectedAnswer("The server does not say which models it has.")
        return found

    def generate(
        self,
        request: GenerateRequest,
        on_event: Callable[[JobEvent], None] | None = None,
    ) -> GenerateResult:
        """Make pictures and wait for them.

        Args:
            request: What to make.
            on_event: Called with each event, the last one included.

        Raises:
            JobCancelled: Somebody cancelled the job.
        """
        record = self.submit(request)
        try:
            for event in self.follow(record.id):
                if on_event is not None:
                    on_event(event)
                if event.is_last:
                    return self._outcome(event)
        except KeyboardInterrupt:
            # Whoever stops waiting does not want the picture any more.
            with suppress(errors.KelvinError):
                self.cancel(record.id)
            raise
        raise UnexpectedAnswer("The job's progress ended without an outcome.")

    def follow(self, job_id: str) -> Iterator[JobEvent]:
        """Yield a job's events until its last, reconnecting when the stream breaks.

        A stream opened again tells the job from its beginning; only what goes further than any
        before it shows that the job, and not just the connection, is alive.
        """
        failures = furthest = 0
        while True:
            try:
                for place, event in enumerate(self.events(job_id), start=1):
                    if place > furthest:
                        furthest, failures = place, 0
                    yield event
                    if event.is_last:
                        return
            except ServerUnreachable:
                if failures >= _RECONNECTS:
                    raise
            if failures >= _RECONNECTS:
                raise UnexpectedAnswer(
                    "The job's progress stream keeps ending before the job does.", value=job_id
                )
            time.sleep(self._first_pause_s * 2**failures)
            failures += 1

    def events(self, job_id: str) -> Iterator[JobEvent]:
        """Yield a job's server-sent events over one connection, as long as it lasts."""
        try:
            with self._http.stream("GET", f"/v1/jobs/{job_id}/events") as response:
                if response.status_code >= 400:
                    response.read()
                    raise self._error(response)
                for line in response.iter_lines():
                    # Every event is one data line; event names repeat what the data says.
                    if line.startswith("data:"):
                        yield _parse(JobEvent, line.removeprefix("data:").strip())
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def download(self, image: ImageRef) -> bytes:
        """Fetch a picture by its presigned URL and check it against its SHA-256.

        Raises:
            PictureCorrupt: The bytes are not the ones the result names.
            StorageUnavailable: The object store refused or did not answer.
        """
        where = f"{urlsplit(image.url).scheme}://{urlsplit(image.url).netloc}"
        try:
            response = httpx.get(
                image.url,
                timeout=self._timeout,
                follow_redirects=True,
                trust_env=not is_loopback(image.url),
            )
        except httpx.TransportError as error:
            raise errors.StorageUnavailable(
                f"The picture was made, but {where} did not answer: {type(error).__name__}.",
                value=image.s3_uri,
                allowed="a public_endpoint_url that this machine reaches",
            ) from error
        if response.status_code != 200:
            raise errors.StorageUnavailable(
                f"The picture was made, but {where} answered {response.status_code}.",
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

    def _outcome(self, event: JobEvent) -> GenerateResult:
        if event.result is not None:
            return event.result
        if event.event == "cancelled":
            raise errors.JobCancelled("The job was cancelled.", value=event.id)
        raise error_from_body(event.error)

    def _record(self, method: str, path: str, request: GenerateRequest | None = None) -> JobRecord:
        return _parse(JobRecord, self._call(method, path, request).content)

    def _call(
        self, method: str, path: str, request: GenerateRequest | None = None
    ) -> httpx.Response:
        try:
            response = self._http.request(
                method,
                path,
                content=None if request is None else _body(request),
                headers=None if request is None else {"content-type": "application/json"},
            )
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if response.status_code >= 400:
            raise self._error(response)
        return response

    def _unreachable(self, error: Exception) -> ServerUnreachable:
        return ServerUnreachable(
            f"No Kelvin answers at {self.url} ({type(error).__name__}).",
            field="url",
            value=self.url,
            allowed="a running server: start one with `kelvin up`, or name one with --url",
        )

    def _error(self, response: httpx.Response) -> errors.KelvinError:
        try:
            return error_from_body(response.json())
        except (json.JSONDecodeError, UnicodeDecodeError):
            if response.status_code == errors.Overloaded.status:
                # Serve's proxy refuses in plain text what the Pipeline never sees.
                return errors.Overloaded(
                    f"Too many calls wait at {self.url}.", allowed="trying again later"
                )
            return UnexpectedAnswer(
                f"{self.url} answered {response.status_code}, and not as Kelvin does.",
                field="url",
                value=self.url,
                allowed="the URL of a Kelvin server",
            )


def _authorization(api_key: str | None) -> dict[str, str]:
    if api_key is None:
        return {}
    if not is_key(api_key):
        raise errors.InvalidRequest(
            "The API key is none.", field="api_key", allowed="what `kelvin keys create` has shown"
        )
    return {"authorization": f"Bearer {api_key}"}


def _body(request: GenerateRequest) -> bytes:
    return request.model_dump_json(exclude_none=True).encode()


def _parse(kind: type[_Answer], text: str | bytes) -> _Answer:
    try:
        return kind.model_validate_json(text)
    except (ValidationError, errors.KelvinError) as error:
        raise UnexpectedAnswer(
            f"The server's {kind.__name__} cannot be read: is it another version of Kelvin?",
            value=str(error).splitlines()[0],
        ) from None
