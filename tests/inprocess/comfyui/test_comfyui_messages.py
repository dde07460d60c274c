"""What a websocket hears."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import struct
from typing import Any

import httpx
import numpy as np
import pytest
import websockets.asyncio.client
import websockets.exceptions
import websockets.sync.client
from PIL import Image

from deployments.payloads import StepProgress
from serve.comfyui_settings import ComfyuiSettings
from serve.config import PipelineSettings, StorageSettings
from serve.errors import RecordUnreadable, StageFailed, StorageUnavailable
from serve.http import comfyui_door, comfyui_following
from serve.http.comfyui_prompts import now_ms
from serve.pipeline import Pipeline
from serve.storage import ObjectStore
from tests.inprocess.comfyui.caller import ENDS_WITHIN_S, end, received, sent, workflow
from tests.inprocess.comfyui.elsewhere import cancelled_elsewhere
from tests.inprocess.served import Served, served
from tests.inprocess.stand_in_stages import StandIn, new_pipeline


def test_the_websocket_tells_what_happens(http: httpx.Client, server: Served, stages: StandIn):
    preview = np.zeros((8, 8, 3), np.uint8)
    stages.steps = [StepProgress(1, 2, 0.1, preview=preview), StepProgress(2, 2, 0.1)]
    server.call(stages.gate.clear)
    heard = received(
        server.url,
        "a",
        workflow(),
        http,
        on_preview=lambda: server.call(stages.gate.set),
        extra_data={"preview_method": "auto"},
    )
    first = heard[0]
    assert first["data"]["status"] == {"exec_info": {"queue_remaining": 0}}
    assert first["data"]["sid"] == "a"
    told = [each["type"] for each in heard if isinstance(each, dict) and each["type"] != "status"]
    assert told == [
        "execution_start",
        "execution_cached",
        "executing",
        "executing",
        "progress",
        "progress",
        "executing",
        "executing",
        "executed",
        "execution_success",
        "executing",
    ]
    (picture,) = [each for each in heard if isinstance(each, bytes)]
    assert struct.unpack(">II", picture[:8]) == (1, 1)
    with Image.open(io.BytesIO(picture[8:])) as image:
        assert (image.format, image.size) == ("JPEG", (8, 8))
    (executed,) = [each for each in heard if isinstance(each, dict) and each["type"] == "executed"]
    assert http.get("/view", params=executed["data"]["output"]["images"][0]).status_code == 200
    remaining = [
        each["data"]["status"]["exec_info"]["queue_remaining"]
        for each in heard
        if isinstance(each, dict) and each["type"] == "status"
    ]
    assert (remaining[0], remaining[-1]) == (0, 0)


def test_the_end_is_told_once_the_store_knows_of_it(
    http: httpx.Client,
    server: Served,
    pipeline: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(comfyui_following, "_ASKED_AGAIN_S", 0.05)
    real, refusals = pipeline.events, iter([True, True])

    async def cut_short(job_id: str, tenant: str) -> Any:
        async for event in real(job_id, tenant):
            if event.event == "decode":
                return  # as if the process were to go, and left the job to another one
            yield event

    async def away(job_id: str, tenant: str) -> Any:
        if next(refusals, False):
            raise StorageUnavailable("The store is away.")
        return await Pipeline.job(pipeline, job_id, tenant)

    monkeypatch.setattr(pipeline, "events", cut_short)
    monkeypatch.setattr(pipeline, "job", away)
    heard = received(server.url, "a", workflow(), http)
    kinds = [each["type"] for each in heard]
    assert kinds.count("executed") == kinds.count("execution_success") == 1


def test_who_asks_for_no_previews_gets_none(http: httpx.Client, server: Served, stages: StandIn):
    heard = received(server.url, "a", workflow(), http)
    assert not [each for each in heard if isinstance(each, bytes)]
    assert stages.denoised[0].preview_every == 0


def test_a_failure_is_heard(http: httpx.Client, server: Served, stages: StandIn):
    stages.error = StageFailed("No.", field="prompt")
    heard = received(server.url, "a", workflow(), http)
    (error,) = [each["data"] for each in heard if each["type"] == "execution_error"]
    assert (error["node_id"], error["node_type"]) == ("5", "KSampler")
    assert error["exception_message"].startswith("No.")


def test_a_websocket_hears_of_prompts_that_another_process_took(
    stages: StandIn,
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(comfyui_door, "_LOOKED_AGAIN_S", 0.05)
    two: dict[str, Any] = {
        "pipeline": PipelineSettings(num_replicas=2),
        "comfyui": ComfyuiSettings(),
    }
    with (
        served(new_pipeline(stages, storage, monkeypatch, **two)) as takes,
        served(new_pipeline(StandIn(), storage, monkeypatch, **two)) as tells,
        httpx.Client(base_url=takes.url) as http,
    ):
        takes.call(stages.gate.clear)
        before = sent(http, workflow(), client_id="a")
        address = f"{tells.url.replace('http', 'ws')}/ws?clientId=a"
        with websockets.sync.client.connect(address, open_timeout=ENDS_WITHIN_S) as socket:
            first = json.loads(socket.recv(ENDS_WITHIN_S))
            assert first["data"]["status"]["exec_info"]["queue_remaining"] == 1
            takes.call(stages.gate.set)
            after = sent(http, workflow(), client_id="a")
            awaited = [end(before), end(after)]
            heard: list[Any] = []
            while not all(message in heard for message in awaited):
                heard.append(json.loads(socket.recv(ENDS_WITHIN_S)))
        kinds = [each["type"] for each in heard]
        assert kinds.count("executed") == kinds.count("execution_success") == 2


def test_a_websocket_hears_of_a_prompt_that_was_given_up_and_is_made_by_another_process(
    stages: StandIn, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(comfyui_door, "_LOOKED_AGAIN_S", 0.05)
    two: dict[str, Any] = {
        "pipeline": PipelineSettings(num_replicas=2),
        "comfyui": ComfyuiSettings(),
    }
    with (
        served(new_pipeline(StandIn(), storage, monkeypatch, **two)) as takes,
        served(new_pipeline(stages, storage, monkeypatch, **two)) as tells,
        httpx.Client(base_url=takes.url) as elsewhere,
        httpx.Client(base_url=tells.url) as http,
    ):
        tells.call(stages.gate.clear)
        address = f"{tells.url.replace('http', 'ws')}/ws?clientId=a"
        with websockets.sync.client.connect(address, open_timeout=ENDS_WITHIN_S) as socket:

            def hear_end() -> list[str]:
                heard: list[Any] = []
                while end("p") not in heard:
                    heard.append(json.loads(socket.recv(ENDS_WITHIN_S)))
                return [each["type"] for each in heard]

            sent(http, workflow(), client_id="a", prompt_id="p")
            http.post("/interrupt", json={"prompt_id": "p"})
            assert "execution_interrupted" in hear_end()
            http.post("/history", json={"clear": True})
            sent(elsewhere, workflow(), client_id="a", prompt_id="p")
            assert "execution_success" in hear_end()


async def test_a_websocket_hears_of_its_prompt_however_many_others_came(
    stages: StandIn, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(comfyui_door, "_LOOKED_AGAIN_S", 0.05)
    two: dict[str, Any] = {
        "pipeline": PipelineSettings(num_replicas=2),
        "comfyui": ComfyuiSettings(),
    }
    store = ObjectStore(storage)
    with served(new_pipeline(stages, storage, monkeypatch, **two)) as tells:
        address = f"{tells.url.replace('http', 'ws')}/ws?clientId=a"
        async with websockets.asyncio.client.connect(address) as socket:
            await socket.recv()
            # As other processes write them, whose clocks differ a little.
            for _ in range(20):
                await cancelled_elsewhere(store, "b", now_ms() + 1000)
            own = (await cancelled_elsewhere(store, "a", now_ms())).id
            async with asyncio.timeout(ENDS_WITHIN_S):
                while json.loads(await socket.recv()) != end(own):
                    pass
    store.close()


def test_after_a_restart_other_clients_prompts_are_counted_too(
    stages: StandIn, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    with (
        served(new_pipeline(stages, storage, monkeypatch)) as before,
        served(new_pipeline(StandIn(), storage, monkeypatch)) as after,
        httpx.Client(base_url=before.url) as http,
    ):
        before.call(stages.gate.clear)
        sent(http, workflow(), client_id="another")
        address = f"{after.url.replace('http', 'ws')}/ws?clientId=a"
        with websockets.sync.client.connect(address, open_timeout=ENDS_WITHIN_S) as socket:
            left: list[int] = []
            while left != [1, 0]:
                status = json.loads(socket.recv(ENDS_WITHIN_S))["data"]["status"]
                told = status["exec_info"]["queue_remaining"]
                left += [told] if [told] != left[-1:] else []
                before.call(stages.gate.set)


def test_a_websocket_that_cannot_be_met_is_closed_with_the_reason(
    server: Served, monkeypatch: pytest.MonkeyPatch
):
    async def away(*_: Any) -> Any:
        raise StorageUnavailable("The store is away.")

    monkeypatch.setattr(comfyui_door.ComfyuiDoor, "meet", away)
    url = f"{server.url.replace('http', 'ws')}/ws?clientId=a"
    with (
        websockets.sync.client.connect(url) as socket,
        pytest.raises(websockets.exceptions.ConnectionClosed) as closed,
    ):
        socket.recv(timeout=ENDS_WITHIN_S)
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1013, "storage_unavailable")


@pytest.mark.parametrize(
    ("path", "status", "field"),
    [
        (f"/ws?clientId={'a' * 201}", 400, "clientId"),
        ("/v1/jobs", 404, "path"),
        ("/api/nothing", 404, "path"),
    ],
)
def test_a_websocket_that_cannot_be_opened_is_told_why(
    server: Served, path: str, status: int, field: str
):
    with (
        pytest.raises(websockets.exceptions.InvalidStatus) as caught,
        websockets.sync.client.connect(f"{server.url.replace('http', 'ws')}{path}"),
    ):
        pass
    answer = caught.value.response
    assert answer.status_code == status
    error = json.loads(answer.body)["error"]
    told = error.get("extra_info", error)  # ComfyUI's shape, or Kelvin's
    assert told["field"] == field
    assert told["allowed"]


def test_a_websocket_is_for_listening(server: Served):
    address = f"{server.url.replace('http', 'ws')}/ws?clientId={'a' * 200}"
    with websockets.sync.client.connect(address, open_timeout=ENDS_WITHIN_S) as socket:
        socket.send(json.dumps({"type": "feature_flags", "data": {}}))
        assert json.loads(socket.recv(ENDS_WITHIN_S))["data"]["sid"] == "a" * 200
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            for large in ("x" * 100_000, b"x" * 100_000):
                socket.send(large)  # the second one may find it closed
        with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            socket.recv(ENDS_WITHIN_S)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009


def test_a_record_that_cannot_be_read_keeps_nobody_from_their_end(
    http: httpx.Client, server: Served, monkeypatch: pytest.MonkeyPatch
):
    damages, tell = iter([True]), comfyui_door.ComfyuiDoor.tell_status

    async def damaged(door: comfyui_door.ComfyuiDoor, tenant: str) -> None:
        if next(damages, False):
            raise RecordUnreadable("Somebody else wrote it.")
        await tell(door, tenant)

    monkeypatch.setattr(comfyui_door.ComfyuiDoor, "tell_status", damaged)
    heard = received(server.url, "a", workflow(), http)
    assert "execution_success" in [each["type"] for each in heard]
