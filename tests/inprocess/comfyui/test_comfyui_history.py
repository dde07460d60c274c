"""What stays of a prompt whose jobs are deleted, and of one that was removed from history."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from serve.config import StorageSettings
from serve.http.comfyui_prompts import now_ms
from serve.jobs import JobJournal
from serve.storage import ObjectStore
from tests.inprocess.comfyui.caller import history, sent, until, workflow
from tests.inprocess.comfyui.elsewhere import cancelled_elsewhere, taken_elsewhere
from tests.inprocess.served import Served
from tests.inprocess.stand_in_stages import StandIn


def _jobs_by_output(http: httpx.Client, prompt_id: str) -> dict[str, str]:
    """Return the job of each output node: it stands in its pictures' names."""
    jobs = [job["id"] for job in http.get("/v1/jobs").json()["jobs"]]
    outputs = history(http, prompt_id)["outputs"]
    return {
        node: next(job for job in jobs if job in shown["images"][0]["filename"])
        for node, shown in outputs.items()
    }


def _purge(http: httpx.Client, job_id: str) -> None:
    answer = http.delete(f"/v1/jobs/{job_id}", params={"purge": "true"})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("named", [{}, {"prompt_id": "p"}], ids=["drawn", "named"])
@pytest.mark.parametrize("purged", ["12", "22"], ids=["first chain", "other chain"])
async def test_a_prompt_stays_as_long_as_one_of_its_jobs_does(
    http: httpx.Client, storage: StorageSettings, purged: str, named: dict[str, str]
):
    def check() -> None:
        sent(http, workflow(), prompt_id="before")
        history(http, "before")
        prompt_id = sent(http, workflow("two_chains"), **named)
        jobs = _jobs_by_output(http, prompt_id)
        kept = ({"12", "13", "22"} - {purged}) if purged == "22" else {"22"}
        (image,) = history(http, prompt_id)["outputs"][min(kept)]["images"]
        picture = http.get("/view", params=image).content
        _purge(http, jobs[purged])
        entry = history(http, prompt_id)
        assert set(entry["outputs"]) == kept
        assert list(http.get("/history").json()) == ["before", prompt_id]
        assert http.get("/view", params=image).content == picture, "its workflow is in it"
        # As of a whole one.
        assert sent(http, workflow("two_chains"), prompt_id=prompt_id) == prompt_id
        assert http.post("/prompt", json={"prompt": workflow(), "prompt_id": prompt_id}).is_error
        assert http.post("/history", json={"delete": [prompt_id]}).status_code == 200
        assert list(http.get("/history").json()) == ["before"]
        _purge(http, jobs[min(kept)])
        assert http.get(f"/history/{prompt_id}").json() == {}

    await asyncio.to_thread(check)
    left = await ObjectStore(storage).list_keys("comfyui/")
    assert left == [], "the workflow, its prompts in it, goes with the last job"


def test_a_prompt_goes_on_though_the_job_of_its_first_chain_is_purged(
    http: httpx.Client, server: Served, stages: StandIn
):
    server.call(stages.gate.clear)
    prompt_id = sent(http, workflow("two_chains"))
    until(lambda: http.get("/queue").json()["queue_running"])
    newest, _ = http.get("/v1/jobs").json()["jobs"]
    # The job of the first chain is accepted last.
    _purge(http, newest["id"])
    (item,) = http.get("/queue").json()["queue_running"]
    assert item[1] == prompt_id
    server.call(stages.gate.set)
    assert set(history(http, prompt_id)["outputs"]) == {"22"}


@pytest.mark.parametrize("graph", ["guide", "two_chains"])
def test_a_prompt_that_was_cancelled_and_removed_from_history_is_made_when_sent_again(
    http: httpx.Client, server: Served, stages: StandIn, graph: str
):
    for _ in range(2):
        server.call(stages.gate.clear)
        assert sent(http, workflow(graph), prompt_id="p") == "p"
        until(lambda: http.get("/queue").json()["queue_running"])
        assert http.post("/interrupt", json={"prompt_id": "p"}).status_code == 200
        history(http, "p")
        # As long as it is in history, it is what became of it.
        assert sent(http, workflow(graph), prompt_id="p") == "p"
        assert history(http, "p")["status"]["status_str"] == "error"
        assert http.post("/history", json={"delete": ["p"]}).status_code == 200
        assert http.get("/history/p").json() == {}
    server.call(stages.gate.set)
    # Seen differently, it is another request of the same pictures.
    asked = {"client_id": "c", "extra_data": {"preview_method": "auto"}}
    assert sent(http, workflow(graph), prompt_id="p", **asked) == "p"
    assert history(http, "p")["status"]["completed"]
    assert list(http.get("/history").json()) == ["p"]
    made = len(stages.denoised)
    # What was made is not made again, though it was removed.
    assert http.post("/history", json={"clear": True}).status_code == 200
    assert sent(http, workflow(graph), prompt_id="p") == "p"
    assert list(http.get("/history").json()) == ["p"]
    assert len(stages.denoised) == made


async def test_a_long_history_is_cleared_without_being_read(
    http: httpx.Client,
    server: Served,
    stages: StandIn,
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
):
    server.call(stages.gate.clear)
    store, hour_ago_ms = ObjectStore(storage), now_ms() - 3_600_000
    old = [await cancelled_elsewhere(store, "a", hour_ago_ms + number) for number in range(20)]
    going_on = await taken_elsewhere(store, "a", hour_ago_ms - 1)
    asked: list[str] = []
    get = ObjectStore.get

    async def counted(store: ObjectStore, key: str) -> bytes | None:
        asked.append(key)
        return await get(store, key)

    def check() -> None:
        young = sent(http, workflow())
        assert len(http.get("/history").json()) == len(old)
        with monkeypatch.context() as counting:
            counting.setattr(ObjectStore, "get", counted)
            assert http.post("/history", json={"clear": True}).status_code == 200
        assert not [key for key in asked if any(record.job in key for record in old)]
        assert http.get("/history").json() == {}
        server.call(stages.gate.set)
        assert history(http, young)["status"]["completed"]
        for record in old:
            assert http.get(f"/history/{record.id}").json() == {}
            assert http.get(f"/v1/jobs/{record.job}").json()["status"] == "cancelled"

    await asyncio.to_thread(check)
    await JobJournal(store).request_cancel(going_on.job)
    assert (await asyncio.to_thread(http.get, f"/history/{going_on.id}")).json()
    store.close()
