"""The Python clients against a whole service: every method of theirs, both alike."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import pytest
from PIL import Image

from serve.client import AsyncKelvin, Kelvin
from serve.errors import JobCancelled, JobConflict, JobNotFound
from serve.requests import GenerateRequest, JobEvent
from tests.inprocess.local_service import Service

REQUEST = GenerateRequest(prompt="a red circle", seed=7, preview_every=1)
LONG = GenerateRequest(prompt="a long one", num_inference_steps=200)


class Awaited:
    """The asynchronous client, each call awaited: so that one test is about both."""

    def __init__(self, url: str, key: str) -> None:
        self._loop = asyncio.Runner()
        self._client = AsyncKelvin(url, api_key=key)

    def __enter__(self) -> Awaited:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run(self._client.close())
        self._loop.close()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        async def all_of(events: Any) -> list[Any]:
            return [each async for each in events]

        def call(*arguments: Any) -> Any:
            answer = method(*arguments)
            return self._loop.run(all_of(answer) if hasattr(answer, "__aiter__") else answer)

        return call


@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_a_client_does_all_that_the_service_offers(service: Service, kind: str):
    key = service.key()
    opened: Any = Kelvin(service.url, api_key=key) if kind == "blocking" else None
    with opened or Awaited(service.url, key) as client:
        told: list[JobEvent] = []
        result = client.generate(REQUEST, told.append)
        assert [event.event for event in told][:: len(told) - 1] == ["queued", "stored"]
        assert any(event.preview for event in told)
        picture = client.download(result.images[0])
        with Image.open(io.BytesIO(picture)) as image:
            assert image.size == (64, 64)
        job = client.submit(LONG)
        assert client.job(job.id).status == "running"
        assert [each.id for each in client.jobs()] == [job.id, result.id]
        assert client.cancel(job.id).status == "cancelled"
        with pytest.raises(JobCancelled):
            client.wait(job.id)
        with pytest.raises(JobConflict):
            client.cancel(result.id)
        assert client.wait(result.id).images[0].sha256 == result.images[0].sha256
        assert next(iter(client.events(result.id))).event == "queued"
        assert client.models()[0]["name"] == "pico"
        assert client.usage()["images"] == 1
        assert client.status()["model"]["name"] == "pico"
        client.delete(result.id)
        with pytest.raises(JobNotFound):
            client.job(result.id)
