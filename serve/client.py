"""HTTP clients of the native API: submit, follow, fetch; the same typed errors as everywhere.

    from serve.client import Kelvin
    from serve.requests import GenerateRequest

    with Kelvin() as kelvin:
        result = kelvin.generate(GenerateRequest(prompt="a red heart"))
        picture = kelvin.download(result.images[0])

`Kelvin` blocks, `AsyncKelvin` is awaited; they have the same methods. Both hold a job's id, not a
connection: when the progress stream breaks they ask again, because an accepted job lives in the
object store and not in the process that took it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any

import httpx

from serve import client_wire as wire
from serve import errors
from serve.async_client import AsyncKelvin
from serve.client_errors import ServerUnreachable
from serve.keys import without_keys
from serve.loopback import DEFAULT_URL, is_loopback
from serve.requests import (
    GenerateRequest,
    GenerateResult,
    ImageRef,
    JobEvent,
    JobPage,
    JobRecord,
    Upload,
)

__all__ = ["AsyncKelvin", "Kelvin"]


class Kelvin:
    """Speaks to one Kelvin and blocks; a context manager.

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
        first_pause_s: float = wire.FIRST_PAUSE_S,
    ) -> None:
        base = wire.checked_url(url)
        self.url = without_keys(base)
        self._first_pause_s = first_pause_s
        self._timeout = wire.timeout(timeout_s)
        self._http = httpx.Client(
            base_url=base,
            headers=wire.authorization(api_key),
            timeout=self._timeout,
            trust_env=not is_loopback(url),
        )

    def __enter__(self) -> Kelvin:
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

    def generate(
        self,
        request: GenerateRequest,
        on_event: Callable[[JobEvent], None] | None = None,
    ) -> GenerateResult:
        """Make pictures and wait for them; interrupting it cancels the job.

        Args:
            request: What to make.
            on_event: Called with each event, the last one included.

        Raises:
            JobCancelled: Somebody cancelled the job.
        """
        record = self.submit(request)
        try:
            return self.wait(record.id, on_event)
        except KeyboardInterrupt:
            # Whoever stops waiting does not want the picture any more.
            with suppress(errors.KelvinError):
                self.cancel(record.id)
            raise

    def submit(self, request: GenerateRequest) -> JobRecord:
        """Post a job; it is durable once this returns.

        Raises:
            InvalidRequest: Before anything is sent, as through the Python handle.
        """
        return self._record("POST", "/v1/jobs", **wire.content(request))

    def wait(
        self, job_id: str, on_event: Callable[[JobEvent], None] | None = None
    ) -> GenerateResult:
        """Wait for a job's end; to stop waiting cancels nothing.

        Args:
            job_id: The job.
            on_event: Called with each event from the job's first, the last one included.

        Raises:
            JobCancelled: Somebody cancelled the job.
        """
        for event in self.events(job_id):
            if on_event is not None:
                on_event(event)
            if event.is_last:
                return wire.outcome(event)
        raise wire.no_outcome()

    def job(self, job_id: str) -> JobRecord:
        """Return what is known of a job."""
        return self._record("GET", f"/v1/jobs/{job_id}")

    def jobs(self) -> Iterator[JobRecord]:
        """Yield one's own jobs, newest first; asks for more of them as they are taken."""
        after: dict[str, str] = {}
        while True:
            query = {"limit": str(wire.PAGE), **after}
            page = wire.parsed(JobPage, self._call("GET", "/v1/jobs", params=query).content)
            yield from page.jobs
            if page.next is None:
                return
            after = {"after": page.next}

    def cancel(self, job_id: str) -> JobRecord:
        """Ask that a job stop at its next step."""
        return self._record("DELETE", f"/v1/jobs/{job_id}")

    def delete(self, job_id: str) -> JobRecord:
        """Delete a job with its pictures, ended or not; return what it was."""
        return self._record("DELETE", f"/v1/jobs/{job_id}?purge=true")

    def events(self, job_id: str) -> Iterator[JobEvent]:
        """Yield a job's events until its last, reconnecting when the stream breaks.

        A stream opened again tells the job from its beginning.
        """
        reconnecting = wire.Reconnecting(job_id, self._first_pause_s)
        while True:
            broke: ServerUnreachable | None = None
            try:
                for place, event in enumerate(self._stream(job_id), start=1):
                    reconnecting.saw(place)
                    yield event
                    if event.is_last:
                        return
            except ServerUnreachable as error:
                broke = error
            time.sleep(reconnecting.pause_s(broke))

    def download(self, image: ImageRef) -> bytes:
        """Fetch a picture by its presigned URL and check it against its SHA-256.

        Raises:
            PictureCorrupt: The bytes are not the ones the result names.
            StorageUnavailable: The object store refused or did not answer.
        """
        # Not over the server's connections: the key on them is none of the store's business.
        try:
            response = httpx.get(
                image.url,
                timeout=self._timeout,
                follow_redirects=True,
                trust_env=not is_loopback(image.url),
            )
        except httpx.TransportError as error:
            raise wire.picture_unreachable(image, error) from error
        return wire.picture_in(response, image)

    def upload(self, picture: bytes) -> Upload:
        """Keep a PNG, JPEG or WebP file that requests may start from, by its `init_image`."""
        return wire.parsed(Upload, self._call("POST", "/v1/uploads", content=picture).content)

    def models(self) -> list[dict[str, Any]]:
        """Return every model of the service, with its state, defaults, limits and LoRAs."""
        return wire.models_in(wire.said(self._call("GET", "/v1/models").content))

    def usage(self) -> dict[str, Any]:
        """Return what one's own tenant has used."""
        return wire.said(self._call("GET", "/v1/usage").content)

    def status(self) -> dict[str, Any]:
        """Return the service's own account of itself."""
        return wire.said(self._call("GET", "/v1/status").content)

    def _stream(self, job_id: str) -> Iterator[JobEvent]:
        """Yield a job's server-sent events over one connection, as long as it lasts."""
        try:
            with self._http.stream("GET", f"/v1/jobs/{job_id}/events") as response:
                if response.status_code >= 400:
                    response.read()
                    raise wire.refusal(response, self.url)
                for line in response.iter_lines():
                    event = wire.event_in(line)
                    if event is not None:
                        yield event
        except httpx.TransportError as error:
            raise wire.unreachable(self.url, error) from error

    def _record(self, method: str, path: str, **sent: Any) -> JobRecord:
        return wire.parsed(JobRecord, self._call(method, path, **sent).content)

    def _call(self, method: str, path: str, **sent: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **sent)
        except httpx.TransportError as error:
            raise wire.unreachable(self.url, error) from error
        if response.status_code >= 400:
            raise wire.refusal(response, self.url)
        return response
