"""Prompts: which jobs they are, how often, and what becomes of them."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

from serve.comfyui_settings import ComfyuiSettings
from serve.config import StorageSettings
from serve.errors import StageFailed, StorageUnavailable
from serve.http import comfyui_door
from serve.job_ids import new_job_id
from serve.journal_settings import JournalSettings
from serve.listing_keys import listing_key
from serve.pictures import read_request
from serve.pipeline import Pipeline
from serve.storage import ObjectStore
from serve.sweep import Sweep
from serve.tenants import DEFAULT_TENANT
from tests.inprocess.comfyui.caller import history, png, sent, until, uploaded, workflow
from tests.inprocess.served import Served, served
from tests.inprocess.stand_in_stages import StandIn, new_pipeline


def test_pictures_carry_what_made_them_and_can_be_sent_again(http: httpx.Client):
    page = {"nodes": [{"id": 3, "title": "Büro 日本"}], "links": []}
    graph = workflow("from_a_saved_picture")
    graph["9"]["inputs"]["filename_prefix"] = "Büro/日本 %width%"
    entry = history(
        http, sent(http, graph, extra_data={"extra_pnginfo": {"workflow": page, "": 1}})
    )
    (image,) = entry["outputs"]["9"]["images"]
    assert image["subfolder"] == "Büro"
    assert image["filename"].startswith("日本 64_")
    picture = http.get("/view", params=image)
    assert "%E6%97%A5" in picture.headers["content-disposition"]
    assert picture.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(picture.content)) as opened:
        chunks = opened.info
    assert json.loads(chunks["workflow"]) == page
    assert json.loads(chunks["prompt"]) == graph
    assert read_request(picture.content).prompt == "a glass teapot, studio photograph"
    again = history(http, sent(http, json.loads(chunks["prompt"])))
    assert again["status"]["status_str"] == "success"
    small = http.get("/view", params=image | {"preview": "webp;50"})
    assert small.headers["content-type"] == "image/webp"
    assert http.get("/view", params={"filename": "../../etc/passwd"}).status_code == 404


def test_several_chains_are_several_jobs_of_one_prompt(
    http: httpx.Client, server: Served, stages: StandIn
):
    server.call(stages.gate.clear)
    prompt_id = sent(http, workflow("two_chains"))
    assert http.get(f"/history/{prompt_id}").json() == {}
    assert http.get("/prompt").json() == {"exec_info": {"queue_remaining": 1}}
    (item,) = until(lambda: http.get("/queue").json()["queue_running"])
    assert item[1] == prompt_id
    assert item[4] == ["12", "13", "22"]
    server.call(stages.gate.set)
    entry = history(http, prompt_id)
    kinds = {
        node: [each["type"] for each in shown["images"]] for node, shown in entry["outputs"].items()
    }
    assert kinds == {"12": ["output"], "13": ["temp"], "22": ["output"]}
    assert entry["status"]["completed"] is True
    assert {job.seed for job in stages.denoised} == {1, 2}
    listed = http.get("/history", params={"max_items": 1}).json()
    assert listed == {prompt_id: entry}


def test_a_prompt_of_too_many_chains_is_refused_before_any_is_a_job(http: httpx.Client):
    graph = workflow()
    for number in range(65):
        sampler, decoder = f"sampler {number}", f"decoder {number}"
        graph[sampler] = {**graph["5"], "inputs": graph["5"]["inputs"] | {"seed": number}}
        graph[decoder] = {**graph["6"], "inputs": graph["6"]["inputs"] | {"samples": [sampler, 0]}}
        graph[f"output {number}"] = {
            **graph["7"],
            "inputs": graph["7"]["inputs"] | {"images": [decoder, 0]},
        }
    refused = http.post("/prompt", json={"prompt": graph})
    assert refused.status_code == 400
    assert refused.json()["error"]["details"].startswith("at most 64")
    assert http.get("/v1/jobs").json()["jobs"] == []


def test_one_chain_that_fails_leaves_the_others_pictures(http: httpx.Client, stages: StandIn):
    real = stages._decode
    failing = iter([True])

    async def decode(latents: Any) -> Any:
        if next(failing, False):
            raise StageFailed("No.", field="prompt", value="x", allowed="y")
        return await real(latents)

    stages._decode = decode  # type: ignore[method-assign]
    entry = history(http, sent(http, workflow("two_chains")))
    assert entry["status"]["status_str"] == "error"
    event, data = entry["status"]["messages"][-1]
    assert event == "execution_error"
    assert data["exception_type"] == "StageFailed"
    assert "prompt: 'x'. Allowed: y." in data["exception_message"]
    assert data["node_type"] == "KSampler"
    assert len(entry["outputs"]) in (1, 2)


def test_an_output_that_cannot_be_made_does_not_stop_the_rest(http: httpx.Client):
    graph = workflow("two_chains")
    graph["5"]["inputs"]["width"] = 64
    graph["23"] = graph["5"] | {"inputs": graph["5"]["inputs"] | {"width": 4096}}
    graph["20"]["inputs"]["latent_image"] = ["23", 0]
    answer = http.post("/prompt", json={"prompt": graph}).json()
    (told,) = answer["node_errors"].values()
    assert told["dependent_outputs"] == ["22"]
    assert told["errors"][0]["extra_info"]["field"] == "width"
    assert set(history(http, answer["prompt_id"])["outputs"]) == {"12", "13"}


def test_a_prompt_id_is_one_prompt_however_often_it_is_sent(http: httpx.Client, stages: StandIn):
    for _ in range(2):
        assert sent(http, workflow(), prompt_id="order-17") == "order-17"
    history(http, "order-17")
    assert sent(http, workflow(), prompt_id="order-17") == "order-17"
    assert http.post("/history", json={"delete": ["order-17"]}).status_code == 200
    assert http.get("/history/order-17").json() == {}
    # Who sends it again wants to hear of it.
    assert sent(http, workflow(), prompt_id="order-17") == "order-17"
    assert list(http.get("/history").json()) == ["order-17"]
    assert history(http, "order-17")["status"]["completed"]
    assert len(stages.denoised) == 1
    other = workflow()
    other["5"]["inputs"]["seed"] = 2
    answer = http.post("/prompt", json={"prompt": other, "prompt_id": "order-17"})
    assert answer.status_code == 409
    assert answer.json()["error"]["extra_info"]["field"] == "prompt_id"
    wrongs: list[Any] = ["", "x" * 300, "é", {}, []]
    for wrong in wrongs:
        assert http.post("/prompt", json={"prompt": other, "prompt_id": wrong}).status_code == 400


async def test_a_prompt_whose_job_was_deleted_leaves_no_list_and_is_told_so(
    http: httpx.Client, storage: StorageSettings
):
    prompt_id = sent(http, workflow(), prompt_id="p")
    history(http, prompt_id)
    (job,) = http.get("/v1/jobs").json()["jobs"]
    assert http.delete(f"/v1/jobs/{job['id']}", params={"purge": "true"}).status_code == 200
    assert http.get("/history/p").json() == {} == http.get("/history").json()
    assert await ObjectStore(storage).list_keys("listing/") == []
    answer = http.post("/prompt", json={"prompt": workflow(), "prompt_id": "p"})
    assert answer.status_code == 409
    assert "deleted" in answer.json()["error"]["message"]


def test_another_process_answers_for_what_it_never_saw(
    http: httpx.Client,
    stages: StandIn,
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
):
    prompt_id = sent(http, workflow("two_chains"), client_id="c")
    entry = history(http, prompt_id)
    other = new_pipeline(stages, storage, monkeypatch, comfyui=ComfyuiSettings())
    with served(other) as elsewhere, httpx.Client(base_url=elsewhere.url) as away:
        assert away.get(f"/history/{prompt_id}").json() == {prompt_id: entry}
        (image,) = entry["outputs"]["22"]["images"]
        assert away.get("/view", params=image).content == http.get("/view", params=image).content
        assert away.post("/history", json={"delete": [prompt_id]}).status_code == 200
    assert http.get(f"/history/{prompt_id}").json() == {}
    assert http.get("/history").json() == {}
    assert http.get("/view", params=image).status_code == 200


async def test_a_prompt_takes_no_write_beside_its_jobs(
    http: httpx.Client, pipeline: Pipeline, storage: StorageSettings
):
    def asked() -> None:
        history(http, sent(http, workflow()))
        history(http, sent(http, workflow("two_chains"), prompt_id="p"))

    await asyncio.to_thread(asked)
    store = ObjectStore(storage)
    keys = Counter(key.rpartition("/")[0] for key in await store.list_keys(""))
    store.close()
    expected = {"idempotency": 2, "leases": 1, "listing/default": 1, "listing/default.door": 2}
    for job in (await pipeline.jobs()).jobs:
        expected |= {f"jobs/{job.id}": 2, f"images/{job.id}": 1}
    assert keys == expected


async def test_a_prompt_whose_pipeline_died_before_its_job_was_pending_is_made(
    http: httpx.Client,
    server: Served,
    stages: StandIn,
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
):
    server.call(stages.gate.clear)
    await asyncio.to_thread(sent, http, workflow(), prompt_id="p")
    store = ObjectStore(storage)
    await store.delete((await store.list_keys("pending/"))[0])
    store.close()

    def sent_again() -> None:
        other = new_pipeline(StandIn(), storage, monkeypatch, comfyui=ComfyuiSettings())
        with served(other) as elsewhere, httpx.Client(base_url=elsewhere.url) as away:
            assert away.get("/queue").json() == {"queue_running": [], "queue_pending": []}
            assert sent(away, workflow(), prompt_id="p") == "p"
            assert history(away, "p")["status"]["completed"]

    await asyncio.to_thread(sent_again)
    server.call(stages.gate.set)
    assert (await asyncio.to_thread(history, http, "p"))["status"]["completed"]


def test_a_prompt_that_may_be_on_record_keeps_all_its_chains(
    http: httpx.Client,
    server: Served,
    pipeline: Pipeline,
    stages: StandIn,
    monkeypatch: pytest.MonkeyPatch,
):
    server.call(stages.gate.clear)
    real, lost = pipeline.submit_once, iter([False, True])

    async def answer_lost(*asked: Any) -> Any:
        answer = await real(*asked)
        if next(lost, False):
            raise StorageUnavailable("The store is away.")
        return answer

    monkeypatch.setattr(pipeline, "submit_once", answer_lost)
    body = {"prompt": workflow("two_chains"), "prompt_id": "p"}
    assert http.post("/prompt", json=body).status_code == 503
    server.call(stages.gate.set)
    entry = history(http, "p")
    assert entry["status"]["completed"]
    assert set(entry["outputs"]) == {"12", "13", "22"}
    assert http.post("/prompt", json=body).status_code == 200
    assert len(stages.denoised) == 2


def test_without_a_journal_prompts_live_as_long_as_their_process(
    stages: StandIn, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    sections: dict[str, Any] = {
        "journal": JournalSettings(enabled=False),
        "comfyui": ComfyuiSettings(checkpoints={"sd3.5_large.safetensors": "m"}),
    }
    with (
        served(new_pipeline(stages, storage, monkeypatch, **sections)) as running,
        httpx.Client(base_url=running.url) as http,
    ):
        running.call(stages.gate.clear)
        ids = [sent(http, workflow("two_chains")), sent(http, workflow(), prompt_id="p")]
        assert until(lambda: len(http.get("/queue").json()["queue_running"]) == 2)
        running.call(stages.gate.set)
        entries = [history(http, prompt_id) for prompt_id in ids]
        assert [entry["status"]["completed"] for entry in entries] == [True, True]
        assert list(http.get("/history").json()) == ids
        assert sent(http, workflow(), prompt_id="p") == "p"
        assert http.post("/history", json={"clear": True}).status_code == 200
        assert http.get("/history").json() == {}
        assert http.get("/queue").json() == {"queue_running": [], "queue_pending": []}


def test_interrupt_and_the_queue_cancel(http: httpx.Client, server: Served, stages: StandIn):
    for path, body in (
        ("/interrupt", {}),
        ("/interrupt", {"prompt_id": "p"}),
        ("/queue", {"delete": ["p"]}),
    ):
        server.call(stages.gate.clear)
        prompt_id = sent(http, workflow("two_chains"))
        until(lambda: http.get("/queue").json()["queue_running"])
        named = json.loads(json.dumps(body).replace('"p"', json.dumps(prompt_id)))
        assert http.post(path, json=named).status_code == 200
        entry = history(http, prompt_id)
        event, data = entry["status"]["messages"][-1]
        assert (event, data["node_type"]) == ("execution_interrupted", "KSampler")
        assert entry["outputs"] == {}
        server.call(stages.gate.set)
    assert http.post("/queue", json={"delete": "p"}).status_code == 400
    assert http.post("/interrupt", content=b"").status_code == 200


def test_a_long_queue_is_listed_whole_and_with_so_much_of_workflows(
    http: httpx.Client, server: Served, stages: StandIn, monkeypatch: pytest.MonkeyPatch
):
    server.call(stages.gate.clear)
    graphs = []
    for number in range(3):
        graphs.append(workflow())
        graphs[-1]["5"]["inputs"]["seed"] = number
    extra = {"extra_pnginfo": {"workflow": "x" * 10_000}}
    ids = [sent(http, graph, extra_data=extra) for graph in graphs]
    until(lambda: len(http.get("/queue").json()["queue_running"]) == len(ids))
    monkeypatch.setattr(comfyui_door, "MOST_BYTES_LISTED", 30_000)
    items = http.get("/queue").json()["queue_running"]
    assert [item[1] for item in items] == ids
    assert [item[2] for item in items] == [*graphs[:2], {}]
    assert all(item[3]["create_time"] for item in items)
    assert len(json.dumps(items)) < 30_000
    server.call(stages.gate.set)


def test_an_interrupt_in_chunks_cancels_what_it_names(
    http: httpx.Client, server: Served, stages: StandIn
):
    server.call(stages.gate.clear)
    prompt_id = sent(http, workflow())
    until(lambda: http.get("/queue").json()["queue_running"])
    for content, status in ((b'{"prompt_id": "another"}', 200), (b"not json", 400)):
        chunks = iter([content[:5], content[5:]])
        assert http.post("/interrupt", content=chunks).status_code == status
    server.call(stages.gate.set)
    assert history(http, prompt_id)["status"]["status_str"] == "success"
    assert http.post("/interrupt", content=iter([b""])).status_code == 200


@pytest.mark.parametrize("chains", [1, 2])
def test_a_prompt_that_is_refused_leaves_the_other_as_it_is(
    http: httpx.Client, server: Served, stages: StandIn, chains: int
):
    graph = workflow("two_chains")
    other = json.loads(json.dumps(graph))
    if chains == 2:
        other["20"]["inputs"]["seed"] += 1
    else:
        del other["22"]
    for number in range(4):
        server.call(stages.gate.clear)
        bodies = [{"prompt": each, "prompt_id": f"p{number}"} for each in (graph, other)]
        with ThreadPoolExecutor() as pool:
            answers = list(pool.map(lambda body: http.post("/prompt", json=body), bodies))
        assert sorted(answer.status_code for answer in answers) == [200, 409]
        server.call(stages.gate.set)
        entry = history(http, f"p{number}")
        assert entry["status"]["status_str"] == "success"
        # Of jobs that the refused one brought along none is left to be made for nobody.
        succeeded = [job for job in until(lambda: _all_over(http)) if job["status"] == "succeeded"]
        assert len(succeeded) == (2 if answers[0].status_code == 200 else chains)
        for job in http.get("/v1/jobs").json()["jobs"]:
            http.delete(f"/v1/jobs/{job['id']}", params={"purge": "true"})


def _all_over(http: httpx.Client) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = http.get("/v1/jobs").json()["jobs"]
    return jobs if all(job["status"] in ("succeeded", "cancelled") for job in jobs) else []


@pytest.mark.parametrize("prompt_id", ["a/b", "..", ""])
def test_an_id_that_no_path_can_name_is_refused(http: httpx.Client, prompt_id: str):
    answer = http.post("/prompt", json={"prompt": workflow(), "prompt_id": prompt_id})
    assert answer.status_code == 400
    assert "prompt_id" in answer.text


@pytest.mark.parametrize("body", [{"clear": True}, {"delete": ["p"]}])
def test_what_is_not_over_is_not_in_history_to_be_removed_from_it(
    http: httpx.Client, server: Served, stages: StandIn, body: dict[str, Any]
):
    history(http, sent(http, workflow(), prompt_id="before"))
    server.call(stages.gate.clear)
    sent(http, workflow(), prompt_id="p")
    assert http.post("/history", json=body).status_code == 200
    server.call(stages.gate.set)
    assert history(http, "p")["status"]["completed"]
    assert ("before" in http.get("/history").json()) == ("delete" in body)
    assert http.post("/history", json=body).status_code == 200
    assert "p" not in http.get("/history").json()


async def test_history_is_cleared_behind_keys_that_lead_nowhere(
    http: httpx.Client, storage: StorageSettings
):
    await asyncio.to_thread(lambda: history(http, sent(http, workflow(), prompt_id="p")))
    store = ObjectStore(storage)
    for _ in range(20):
        # Whoever wrote it died before it wrote more.
        key = listing_key(new_job_id(), DEFAULT_TENANT, by_door=True)
        await store.put(key, b"{}", "application/json")
    answer = await asyncio.to_thread(http.post, "/history", json={"clear": True})
    assert answer.status_code == 200
    assert (await asyncio.to_thread(http.get, "/history/p")).json() == {}
    store.close()


async def test_old_prompts_are_swept_and_young_ones_stay(
    http: httpx.Client, storage: StorageSettings
):
    prompt_id = await asyncio.to_thread(sent, http, workflow())
    await asyncio.to_thread(history, http, prompt_id)
    await asyncio.to_thread(uploaded, http, "a.png", png())
    store = ObjectStore(storage)
    day_s = 86_400.0
    young = await Sweep(store, store, 30 * day_s, time.time() + day_s).run()
    assert young.comfyui_records == 0
    assert (await asyncio.to_thread(http.get, f"/history/{prompt_id}")).json()
    old = await Sweep(store, store, 30 * day_s, time.time() + 31 * day_s).run()
    assert (old.comfyui_records, old.jobs) == (1, 1)
    for left in ("comfyui/", "jobs/", "listing/"):
        assert await store.list_keys(left) == []
    assert (await asyncio.to_thread(http.get, f"/history/{prompt_id}")).json() == {}
    store.close()
