"""The client of the native API for asyncio; `serve.client` says what it promises."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Any

import httpx

from serve import client_wire as wire
from serve import errors
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


class AsyncKelvin:
    """Speaks to one Kelvin; an asynchronous context manager.

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
        self._http = httpx.AsyncClient(
            base_url=base,
            headers=wire.authorization(api_key),
            timeout=self._timeout,
            trust_env=not is_loopback(url),
        )

    async def __aenter__(self) -> AsyncKelvin:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def generate(
        self,
        request: GenerateRequest,
        on_event: Callable[[JobEvent], None] | None = None,
    ) -> GenerateResult:
        """Make pictures and wait for them; cancelling the call cancels the job.

        Args:
            request: What to make.
            on_event: Called with each event, the last one included.

        Raises:
            JobCancelled: Somebody cancelled the job.
        """
        record = await self.submit(request)
        try:
            return await self.wait(record.id, on_event)
        except asyncio.CancelledError:
            # Whoever stops waiting does not want the picture any more.
            with suppress(errors.KelvinError):
                await self.cancel(record.id)
            raise

    async def submit(self, request: GenerateRequest) -> JobRecord:
        """Post a job; it is durable once this returns.

        Raises:
            InvalidRequest: Before anything is sent, as through the Python handle.
        """
        return await self._record("POST", "/v1/jobs", **wire.content(request))

    async def wait(
        self, job_id: str, on_event: Callable[[JobEvent], None] | None = None
    ) -> GenerateResult:
        """Wait for a job's end; to stop waiting cancels nothing.

        Args:
            job_id: The job.
            on_event: Called with each event from the job's first, the last one included.

        Raises:
            JobCancelled: Somebody cancelled the job.
        """
        async with aclosing(self.events(job_id)) as events:
            async for event in events:
                if on_event is not None:
                    on_event(event)
                if event.is_last:
                    return wire.outcome(event)
        raise wire.no_outcome()

    async def job(self, job_id: str) -> JobRecord:
        """Return what is known of a job."""
        return await self._record("GET", f"/v1/jobs/{job_id}")

    async def jobs(self) -> AsyncIterator[JobRecord]:
        """Yield one's own jobs, newest first; asks for more of them as they are taken."""
        after: dict[str, str] = {}
        while True:
            query = {"limit": str(wire.PAGE), **after}
            answer = await self._call("GET", "/v1/jobs", params=query)
            page = wire.parsed(JobPage, answer.content)
            for record in page.jobs:
                yield record
            if page.next is None:
                return
            after = {"after": page.next}

    async def cancel(self, job_id: str) -> JobRecord:
        """Ask that a job stop at its next step."""
        return await self._record("DELETE", f"/v1/jobs/{job_id}")

    async def delete(self, job_id: str) -> JobRecord:
        """Delete a job with its pictures, ended or not; return what it was."""
        return await self._record("DELETE", f"/v1/jobs/{job_id}?purge=true")

    async def events(self, job_id: str) -> AsyncGenerator[JobEvent, None]:
        """Yield a job's events until its last, reconnecting when the stream breaks.

        A stream opened again tells the job from its beginning.
        """
        reconnecting = wire.Reconnecting(job_id, self._first_pause_s)
        while True:
            broke: ServerUnreachable | None = None
            place = 0
            try:
                async with aclosing(self._stream(job_id)) as stream:
                    async for event in stream:
                        place += 1
                        reconnecting.saw(place)
                        yield event
                        if event.is_last:
                            return
            except ServerUnreachable as error:
                broke = error
            await asyncio.sleep(reconnecting.pause_s(broke))

    async def download(self, image: ImageRef) -> bytes:
        """Fetch a picture by its presigned URL and check it against its SHA-256.

        Raises:
            PictureCorrupt: The bytes are not the ones the result names.
            StorageUnavailable: The object store refused or did not answer.
        """
        # Not over the server's connections: the key on them is none of the store's business.
        try:
            async with httpx.AsyncClient(
                timeout=self._timeout,
                follow_redirects=True,
                trust_env=not is_loopback(image.url),
            ) as http:
                response = await http.get(image.url)
        except httpx.TransportError as error:
            raise wire.picture_unreachable(image, error) from error
        return wire.picture_in(response, image)

    async def upload(self, picture: bytes) -> Upload:
        """Keep a PNG, JPEG or WebP file that requests may start from, by its `init_image`."""
        answer = await self._call("POST", "/v1/uploads", content=picture)
        return wire.parsed(Upload, answer.content)

    async def models(self) -> list[dict[str, Any]]:
        """Return every model of the service, with its state, defaults, limits and LoRAs."""
        return wire.models_in(wire.said((await self._call("GET", "/v1/models")).content))

    async def usage(self) -> dict[str, Any]:
        """Return what one's own tenant has used."""
        return wire.said((await self._call("GET", "/v1/usage")).content)

    async def status(self) -> dict[str, Any]:
        """Return the service's own account of itself."""
        return wire.said((await self._call("GET", "/v1/status")).content)

    async def _stream(self, job_id: str) -> AsyncGenerator[JobEvent, None]:
        """Yield a job's server-sent events over one connection, as long as it lasts."""
        try:
            async with self._http.stream("GET", f"/v1/jobs/{job_id}/events") as response:
                if response.status_code >= 400:
                    await response.aread()
                    raise wire.refusal(response, self.url)
                async for line in response.aiter_lines():
                    event = wire.event_in(line)
                    if event is not None:
                        yield event
        except httpx.TransportError as error:
            raise wire.unreachable(self.url, error) from error

    async def _record(self, method: str, path: str, **sent: Any) -> JobRecord:
        return wire.parsed(JobRecord, (await self._call(method, path, **sent)).content)

    async def _call(self, method: str, path: str, **sent: Any) -> httpx.Response:
        try:
            response = await self._http.request(method, path, **sent)
        except httpx.TransportError as error:
            raise wire.unreachable(self.url, error) from error
        if response.status_code >= 400:
            raise wire.refusal(response, self.url)
        return response
