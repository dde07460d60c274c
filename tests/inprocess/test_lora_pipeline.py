"""LoRAs on their way through the Pipeline: checked before a job is accepted, told to each stage."""

from pathlib import Path
from typing import Any

import pytest

from deployments.builtin.pico import write_pico
from serve.checkpoints.lora_file import BaseModel
from serve.config import ModelSettings, StorageSettings
from serve.errors import InvalidRequest, KelvinError
from serve.jobs import JobJournal
from serve.lora_settings import LoraSettings
from serve.pictures import read_request
from serve.pipeline import Pipeline
from serve.requests import GenerateRequest
from serve.storage import ObjectStore
from tests.inprocess.stand_in_stages import StandIn, new_pipeline
from tests.unit.lora_files import random_lora, written


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    folder = write_pico(tmp_path_factory.mktemp("loras") / "pico", seed=0)
    base = BaseModel.of_folder(folder)
    for name, parts in (("ink", ["transformer"]), ("words", ["clip_l"])):
        written(folder / "loras" / f"{name}.safetensors", random_lora(base, 4, 0, *parts))
    written(folder / "loras" / "wide.safetensors", random_lora(base, 100, 0, "transformer"))
    return ModelSettings(path=str(folder))


@pytest.fixture
def stages() -> StandIn:
    return StandIn()


@pytest.fixture
def pipeline(
    model: ModelSettings,
    stages: StandIn,
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> Pipeline:
    return new_pipeline(stages, storage, monkeypatch, model=model)


def asked(*loras: Any) -> GenerateRequest:
    return GenerateRequest(prompt="a", seed=5, loras=loras)


async def test_each_stage_is_told_of_the_loras_that_concern_it(
    pipeline: Pipeline, stages: StandIn, storage: StorageSettings
):
    request = asked({"name": "ink", "weight": 0.5}, "words")
    result = await pipeline.generate(request)
    assert [[(use.name, use.weight) for use in job.loras] for job in stages.encoded] == [
        [("words", 1.0)],
        [("words", 1.0)],
    ]
    (job,) = stages.denoised
    assert [(use.name, use.weight) for use in job.loras] == [("ink", 0.5)]
    assert result.request.loras == request.loras
    store = ObjectStore(storage)
    key = store.key_of(result.images[0].s3_uri)
    assert key is not None
    picture = await store.get(key)
    assert picture is not None
    assert read_request(picture).loras == request.loras
    store.close()


async def test_without_loras_nothing_is_looked_for(
    stages: StandIn, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    nowhere = ModelSettings(path="/nowhere")
    pipeline = new_pipeline(stages, storage, monkeypatch, model=nowhere)
    assert (await pipeline.generate(asked())).images


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody", "There is no LoRA 'nobody' here"),
        ("../pico/loras/ink", "would leave the folder"),
        ("wide", "112 ranks together"),
    ],
)
async def test_what_cannot_be_used_is_refused_and_no_job_is_written_down(
    model: ModelSettings,
    stages: StandIn,
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    words: str,
):
    pipeline = new_pipeline(stages, storage, monkeypatch, model=model, lora=LoraSettings(ranks=64))
    with pytest.raises(InvalidRequest, match=words):
        await pipeline.submit(asked(name))
    assert await JobJournal(ObjectStore(storage)).pending() == []
    assert stages.encoded == []
    assert (await pipeline.generate(asked("ink"))).images


async def test_a_file_that_goes_after_it_was_accepted_fails_the_job_in_words(
    model: ModelSettings,
    stages: StandIn,
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    path = Path(model.path) / "loras" / "brief.safetensors"
    base = BaseModel.of_folder(Path(model.path))
    written(path, random_lora(base, 4, 1, "transformer"))
    pipeline = new_pipeline(stages, storage, monkeypatch, model=model)
    real = JobJournal.accept

    async def accept(*args: Any, **named: Any) -> Any:
        path.unlink()
        return await real(*args, **named)

    monkeypatch.setattr(JobJournal, "accept", accept)
    with pytest.raises(KelvinError, match="There is no LoRA 'brief' here"):
        await pipeline.generate(asked("brief"))
