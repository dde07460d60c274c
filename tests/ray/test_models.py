"""Several models in one service: loaded and unloaded beside one that notices nothing of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from serve.__main__ import main
from serve.admin_turn import admin_turn
from serve.client import Kelvin
from serve.errors import ModelConflict, ModelLoading, ModelNotFound
from serve.requests import GenerateRequest
from tests.ray.world import FAST, World, wait_until

SECOND = "second"
LOAD = ["models", "load", "pico", "--name", SECOND, "--set", "denoiser.num_replicas=1", "--json"]
# Long enough to be under way when something happens, short enough to wait for.
LONG: dict[str, Any] = {"num_inference_steps": 200, "num_images": 4}

Cli = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        code = main([*arguments, "--json"])
        return code, json.loads(capsys.readouterr().out.strip().splitlines()[-1])

    return run


class Background(threading.Thread):
    """A command of the admin while others send requests."""

    def __init__(self, *arguments: str) -> None:
        super().__init__()
        self.arguments = arguments
        self.code: int | None = None
        self.start()

    def run(self) -> None:
        self.code = main(self.arguments)


def send(world: World, **fields: Any) -> httpx.Response:
    return world.http.post("/v1/generate", json=FAST | fields)


def pids(world: World) -> set[int]:
    status = world.http.get("/v1/status").json()
    found = {each["pid"] for stage in status["stages"].values() for each in stage}
    return found | {status["pipeline"]["pid"]}


def ended(world: World, job: str) -> str:
    wait_until(
        lambda: world.http.get(f"/v1/jobs/{job}").json()["status"] not in ("pending", "running")
    )
    return str(world.http.get(f"/v1/jobs/{job}").json()["status"])


@pytest.fixture(scope="module")
def loaded(world: World) -> Iterator[dict[str, Any]]:
    """The second model, loaded while the first works; what was seen on the way."""
    own = world.http.get("/v1/models").json()["models"][0]["name"]
    before = pids(world)
    refused = send(world, model=SECOND)
    job = world.submit(**LONG)
    loading = Background(*LOAD)
    answers: list[httpx.Response] = []

    def answers_with_a_picture() -> bool:
        answers.append(send(world, model=SECOND))
        return answers[-1].is_success

    try:
        wait_until(answers_with_a_picture)
    finally:
        loading.join(120)
    yield {
        "own": own,
        "before": before,
        "refused": refused,
        "answers": answers,
        "code": loading.code,
        "job": ended(world, job),
    }
    main(["models", "unload", SECOND])


def test_loading_says_so_and_the_first_model_goes_on(world: World, loaded: dict[str, Any]):
    refused = loaded["refused"]
    assert refused.status_code == 404
    assert refused.json()["error"]["type"] == ModelNotFound.__name__
    assert refused.json()["error"]["allowed"] == f"one of: {loaded['own']}"
    *others, success = loaded["answers"]
    told = [answer for answer in others if answer.status_code == 503]
    assert told
    assert all(answer.json()["error"]["code"] == ModelLoading.code for answer in told)
    assert all(int(answer.headers["retry-after"]) > 0 for answer in told)
    # Until Serve has heard of it, it is unknown.
    assert {answer.status_code for answer in others} <= {404, 503}
    assert success.json()["model"] == SECOND
    assert loaded["code"] == 0
    assert loaded["job"] == "succeeded"
    assert pids(world) == loaded["before"]


def test_each_model_has_its_denoisers_and_they_share_what_is_the_same(
    world: World, loaded: dict[str, Any]
):
    made = {name: world.generate(model=name) for name in (loaded["own"], SECOND)}
    by_stage = {
        name: {report["stage"]: report["pid"] for report in result["stages"]}
        for name, result in made.items()
    }
    assert by_stage[SECOND]["denoise"] not in loaded["before"]
    assert by_stage[SECOND]["text"] in loaded["before"]
    assert by_stage[SECOND]["decode"] in loaded["before"]
    # Both are pico: the same files, so the same picture.
    first, second = (world.pixels(result) for result in made.values())
    np.testing.assert_array_equal(first, second)
    by_handle = world.handle.generate.remote(GenerateRequest(**FAST, model=SECOND)).result()
    assert by_handle.model == SECOND
    status = world.http.get("/v1/status").json()["further_models"][SECOND]
    assert status["shares"] == ["decode", "text"]
    assert list(status["stages"]) == ["denoise"]
    assert list(status["autoscaling"]["pools"]) == [f"denoiser-{SECOND}"]


def test_the_models_are_listed(world: World, loaded: dict[str, Any], cli: Cli):
    assert world.kelvin is not None
    with Kelvin(world.kelvin.url) as client:
        models = client.models()
    assert [(each["name"], each["state"]) for each in models] == [
        (loaded["own"], "loaded"),
        (SECOND, "loaded"),
    ]
    assert models[1]["defaults"]["width"] > 0
    assert cli("models", "list", "--url", world.kelvin.url) == (0, {"models": models})
    refused = send(world, model="sdxl").json()["error"]
    assert refused["allowed"] == f"one of: {loaded['own']}, {SECOND}"


def test_what_cannot_be_loaded_changes_nothing(
    world: World, loaded: dict[str, Any], cli: Cli, tmp_path: Path
):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\xff" * 100)
    tries: dict[str, tuple[list[str], int, str]] = {
        "a damaged file": ([str(broken)], 2, "configuration_error"),
        "a file that is not there": ([str(tmp_path / "nowhere")], 2, "configuration_error"),
        "the same name": (["pico", "--name", SECOND], 1, "model_conflict"),
        "the service's name": (["pico"], 1, "model_conflict"),
        "more CPUs than there are": (
            ["pico", "--name", "third", "--set", "denoiser.num_cpus=1000"],
            2,
            "configuration_error",
        ),
        "a pool's name taken": (
            ["pico", "--name", "third", "--set", "denoiser.name=denoiser"],
            2,
            "configuration_error",
        ),
        "a misspelt setting": (["pico", "--set", "denoisr.num_gpus=1"], 2, "configuration_error"),
    }
    for name, (arguments, code, kind) in tries.items():
        got, said = cli("models", "load", *arguments)
        assert (got, said["error"]["code"]) == (code, kind), (name, said)
    assert {each["name"] for each in world.http.get("/v1/models").json()["models"]} == {
        loaded["own"],
        SECOND,
    }
    assert pids(world) == loaded["before"]
    assert send(world, model=SECOND).is_success


def test_one_loads_or_unloads_a_model_at_a_time(loaded: dict[str, Any], cli: Cli):
    with admin_turn(SECOND):
        for command in (LOAD, ["models", "unload", SECOND]):
            code, said = cli(*command)
            assert code
            assert said["error"]["code"] == ModelConflict.code
            assert "by another" in said["error"]["message"]
    with admin_turn(SECOND):  # it was given back
        pass


def test_unloading_lets_jobs_end_and_refuses_new_ones(
    world: World, loaded: dict[str, Any], cli: Cli
):
    job = world.submit(**LONG | {"num_images": 8}, model=SECOND)
    code, said = cli("models", "unload", SECOND, "--wait-s", "0")
    assert (code, said["error"]["code"]) == (1, "model_conflict")
    assert send(world, model=SECOND, num_inference_steps=1).is_success
    unloading = Background("models", "unload", SECOND, "--json")
    wait_until(lambda: send(world, model=SECOND, num_inference_steps=1).status_code == 404)
    refused = send(world, model=SECOND)
    assert refused.json()["error"]["allowed"] == f"one of: {loaded['own']}"
    listed = {each["name"]: each["state"] for each in world.http.get("/v1/models").json()["models"]}
    assert listed == {loaded["own"]: "loaded", SECOND: "unloading"}
    assert world.http.get(f"/v1/jobs/{job}").json()["status"] == "running"
    assert ended(world, job) == "succeeded"
    unloading.join(120)
    assert unloading.code == 0
    assert [each["name"] for each in world.http.get("/v1/models").json()["models"]] == [
        loaded["own"]
    ]
    assert send(world, model=SECOND).status_code == 404
    code, said = cli("models", "unload", SECOND)
    assert (code, said["error"]["code"]) == (2, "model_not_found")
    code, said = cli("models", "unload", loaded["own"])
    assert (code, said["error"]["code"]) == (1, "model_conflict")
    assert pids(world) == loaded["before"]
    assert send(world).is_success


def test_serve_deploy_brings_a_model_and_takes_it_away_under_a_job(world: World):
    """What `serve deploy FILE` sends; whoever takes a model away so asks none of its jobs."""
    assert world.kelvin is not None
    before = pids(world)
    application = {
        "name": f"kelvin.{SECOND}",
        "import_path": "serve.app:build_model",
        "route_prefix": None,
        "args": {
            "service": world.kelvin.settings.model_dump(mode="json"),
            "entry": {
                "model": {"path": "pico", "name": SECOND},
                "denoiser": [{"name": "declared", "torch_threads": 1}],
            },
        },
    }
    deploy(application)
    wait_until(lambda: send(world, model=SECOND).is_success)
    job = world.submit(**LONG | {"num_images": 16}, model=SECOND)
    deploy()
    assert ended(world, job) in ("failed", "succeeded")  # calls under way may end
    if (error := world.http.get(f"/v1/jobs/{job}").json()["error"]) is not None:
        assert error["error"]["code"] == "stage_unavailable"
    wait_until(lambda: send(world, model=SECOND).status_code == 404)
    assert pids(world) == before


def deploy(*applications: dict[str, Any]) -> None:
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": list(applications)}))
