"""One request's trace, from its client to the upload, as a collector receives it.

A Pipeline on the real stages behind a real HTTP server; `tests/processes/test_tracing.py` has the
same through Ray.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from loadtest.otlp_receiver import OtlpReceiver, ReceivedSpan, otlp_receiver
from serve import recorders, span_sender, telemetry
from serve.client import Kelvin
from serve.config import Settings, StorageSettings, TelemetrySettings, load_settings
from serve.requests import GenerateRequest
from tests.inprocess.local_service import listening
from tests.trace_shape import covered, tree

_REQUEST = GenerateRequest(prompt="a very private prompt", num_inference_steps=60, seed=7)


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with otlp_receiver() as running:
        yield running


@pytest.fixture(autouse=True)
def _ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No thread goes on sending after its test."""
    monkeypatch.setattr("serve.otlp_recorder._SEND_TIMEOUT_S", 0.5)
    yield
    endpoint = os.environ.get(recorders.OTLP_ENDPOINT)
    if endpoint is not None:
        recorders.otlp_recorder(endpoint).close()


def _traced(endpoint: str, patch: pytest.MonkeyPatch) -> TracerProvider:
    """Trace in this process as replicas do in theirs."""
    settings = Settings(telemetry=TelemetrySettings(otlp_endpoint=endpoint))
    for name, value in telemetry.environment(settings).items():
        patch.setenv(name, value)
    patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    provider = TracerProvider()
    for processor in span_sender.span_processors():
        provider.add_span_processor(processor)
    patch.setattr(trace, "get_tracer_provider", lambda: provider)
    return provider


def _served(storage: StorageSettings) -> Settings:
    pools = ("text_encoder", "denoiser", "vae_decoder")
    return load_settings(
        overrides={
            "model": {"path": "pico"},
            **{pool: [{"name": pool.replace("_", "-"), "torch_threads": 1}] for pool in pools},
        }
    ).model_copy(update={"storage": storage})


def _finished(spans: list[ReceivedSpan], clients: int) -> bool:
    return sum(span.name == "client" for span in spans) == clients and sum(
        span.name == "kelvin.denoise.replica" for span in spans
    ) == sum(span.name == "kelvin.denoise" for span in spans)


def test_one_tree_from_client_to_upload(
    receiver: OtlpReceiver, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = _traced(receiver.endpoint, monkeypatch)
    with listening(_served(storage)) as url, Kelvin(url) as kelvin:
        kelvin.generate(_REQUEST)  # what comes first loads and allocates
        with trace.get_tracer("caller").start_as_current_span("client") as client:
            kelvin.generate(_REQUEST.model_copy(update={"seed": 8}))
    provider.force_flush()
    wanted = f"{client.get_span_context().trace_id:032x}"
    spans = [
        span for span in receiver.wait(lambda spans: _finished(spans, 1)) if span.trace_id == wanted
    ]
    root, children = tree(spans)
    assert root.name == "client"

    def below(span: ReceivedSpan) -> dict[str, ReceivedSpan]:
        return {child.name: child for child in children[span.span_id]}

    door = below(root)["POST /v1/jobs"]
    # Nothing of the web framework's own.
    assert set(below(door)) == {"kelvin.accept", "generate_content pico"}
    assert "kelvin.journal.accept" in below(below(door)["kelvin.accept"])
    work = below(door)["generate_content pico"]
    assert set(below(work)) == {
        "kelvin.text",
        "kelvin.spool",
        "kelvin.share",
        "kelvin.denoise",
        "kelvin.decode",
        "kelvin.picture",
        "kelvin.store",
        "kelvin.presign",
        "kelvin.journal.publish",
    }
    assert work.attributes["gen_ai.operation.name"] == "generate_content"
    for stage in ("text", "denoise", "decode"):
        replica = below(below(work)[f"kelvin.{stage}"])[f"kelvin.{stage}.replica"]
        assert replica.attributes["kelvin.queue_s"] >= 0
    # 60 steps of a picture that is alone are one span.
    denoise = below(below(work)["kelvin.denoise"])["kelvin.denoise.replica"]
    [batch] = children[denoise.span_id]
    assert batch.name == "kelvin.denoise.batch"
    assert batch.attributes["kelvin.forwards"] == 60
    [(linked, part)] = batch.links
    assert linked == denoise.span_id
    assert (part["kelvin.first_step"], part["kelvin.last_step"]) == (1, 60)
    # Not by spans that go round everything, which would prove nothing.
    phases = [span for span in spans if span not in (root, work)]
    assert covered(phases, root) >= 0.95
    assert not any("private" in span.raw for span in spans)


def test_requests_in_one_batch_are_linked(
    receiver: OtlpReceiver, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = _traced(receiver.endpoint, monkeypatch)
    with listening(_served(storage)) as url:

        async def both() -> None:
            async with httpx.AsyncClient(base_url=url, timeout=60) as http:
                body = _REQUEST.model_dump(exclude_none=True) | {"num_inference_steps": 100}
                await asyncio.gather(
                    *(http.post("/v1/generate", json=body | {"seed": seed}) for seed in (1, 2))
                )

        asyncio.run(both())
    provider.force_flush()
    spans = receiver.wait(lambda spans: _finished(spans, 0) and len(spans) > 20)
    denoised = {span.span_id: span for span in spans if span.name == "kelvin.denoise.replica"}
    batches = [span for span in spans if span.name == "kelvin.denoise.batch"]
    shared = [batch for batch in batches if batch.attributes["kelvin.requests"] == 2]
    assert shared, "two pictures that are denoised at once share forwards"
    assert len(batches) <= 4
    for batch in shared:
        assert {span_id for span_id, _ in batch.links} == set(denoised)
        assert batch.parent_id in denoised
    # And back: from who is not above it.
    [other] = [span for span in denoised.values() if span.span_id != shared[0].parent_id]
    assert shared[0].span_id in {span_id for span_id, _ in other.links}
    # Each step of each request is in one batch.
    for span_id in denoised:
        steps = [
            part["kelvin.steps"] for batch in batches for at, part in batch.links if at == span_id
        ]
        assert sum(steps) == 100


@pytest.mark.parametrize("trouble", ["refuses", "hangs"])
def test_a_dead_collector_harms_no_request(
    trouble: str, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    deaf = socket.create_server(("127.0.0.1", 0))  # never accepts
    port = deaf.getsockname()[1]
    if trouble == "refuses":
        deaf.close()
    # Spans wait for a sender that does not get on; more are dropped.
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    _traced(f"http://127.0.0.1:{port}", monkeypatch)
    with listening(_served(storage)) as url, Kelvin(url) as kelvin:
        kelvin.generate(_REQUEST)
        began = time.monotonic()
        for seed in range(3):
            answer: Any = kelvin.generate(_REQUEST.model_copy(update={"seed": seed}))
            assert len(answer.images) == 1
        assert time.monotonic() - began < 5  # a sending that is waited for takes that long alone
    deaf.close()
