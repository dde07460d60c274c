"""LoRAs from a file to a picture: where files are found, and what they do to text and latents."""

import asyncio
import json
import os
import queue
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deployments.builtin.pico import write_pico
from deployments.denoiser import Denoiser
from deployments.engine import Engine
from deployments.lora_files import LoraFiles
from deployments.lora_shelf import LoraShelf
from deployments.payloads import (
    DenoiseJob,
    Latents,
    LoraUse,
    PromptEmbedding,
    Stamp,
    StepProgress,
    TextJob,
)
from deployments.sd3.mmdit import Mmdit
from deployments.sd3.vae import VaeDecoder
from deployments.text_encoder import TextEncoder
from serve.checkpoints.lora_file import BaseModel
from serve.config import ModelSettings, PoolSettings, StorageSettings
from serve.errors import InvalidRequest, StorageUnavailable
from serve.lora_settings import LoraSettings
from serve.loras import LoraLibrary, shown_loras
from serve.model_cache.remote_files import RemoteFile
from serve.model_cache.transfer import Transfer
from serve.requests import GenerateRequest
from serve.storage import ObjectStore
from tests.unit.lora_files import random_lora, written

WAIT_S = 60
NOBODY = Stamp(replica="", pid=0, precision="", queue_s=0.0, seconds=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    folder = tmp_path_factory.mktemp("loras")
    write_pico(folder / "pico", seed=0)
    base = BaseModel.of_folder(folder / "pico")
    for number in range(8):
        rank = (1, 4, 16, 17, 32, 8, 2, 40)[number]
        path = folder / "pico" / "loras" / "styles" / f"s{number}.safetensors"
        written(path, random_lora(base, rank, number, "transformer"))
    written(
        folder / "pico" / "loras" / "words.safetensors", random_lora(base, 4, 9, "clip_l", "t5")
    )
    both = random_lora(base, 4, 10, "transformer", "clip_l")
    written(folder / "pico" / "loras" / "both.safetensors", both)
    return ModelSettings(path=str(folder / "pico"))


@pytest.fixture
def library(model: ModelSettings) -> LoraLibrary:
    return LoraLibrary(model, LoraSettings())


def asked(*loras: Any) -> GenerateRequest:
    return GenerateRequest(prompt="a red circle", loras=loras)


def test_names_are_paths_below_the_folder_with_or_without_suffix(library):
    names = [*(f"styles/s{number}" for number in range(8)), "both", "words"]
    assert library.available() == sorted(names)
    uses = library.uses(asked("both", {"name": "words.safetensors", "weight": -0.5}, "styles/s1"))
    assert [(use.name, use.weight) for use in uses.text] == [("both", 1.0), ("words", -0.5)]
    assert [use.name for use in uses.denoise] == ["both", "styles/s1"]


@pytest.mark.parametrize("names", [("both", "both"), ("both", "both.safetensors")])
def test_a_lora_that_is_named_twice_is_refused(names):
    with pytest.raises(InvalidRequest, match="named twice"):
        asked(*names)


def test_unknown_names_are_told_and_at_most_ten_that_there_are(model, tmp_path):
    models = tmp_path / "models"
    for number in range(12):
        written(models / "loras" / f"l{number:02}.safetensors", {"x": torch.zeros(1)})
    both = LoraLibrary(model.model_copy(update={"models_dir": str(models)}), LoraSettings())
    with pytest.raises(InvalidRequest, match="no LoRA 'nobody' here") as raised:
        both.uses(asked("nobody"))
    assert raised.value.allowed is not None
    assert raised.value.allowed.startswith("one of: both, l00, l01")
    assert raised.value.allowed.endswith("l08 and 12 more")
    with pytest.raises(InvalidRequest, match="LoRA 'l03': .*'x' that no LoRA has"):
        both.uses(asked("l03"))


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "styles/../../x", "a\\b", "a\0b", ".", "styles//s1", "a/./b"],
)
def test_names_that_would_leave_the_folder_are_refused(library, name):
    with pytest.raises(InvalidRequest) as raised:
        library.uses(asked(name))
    assert raised.value.field == "loras"


def test_a_name_too_long_for_a_file_is_unknown(library):
    with pytest.raises(InvalidRequest, match="There is no LoRA"):
        library.uses(asked("é" * 200))


def test_a_link_out_of_the_models_folder_is_refused_and_not_listed(model, tmp_path):
    models = tmp_path / "models"
    (models / "loras").mkdir(parents=True)
    outside = Path(model.path) / "loras" / "both.safetensors"
    os.symlink(outside, models / "loras" / "link.safetensors")
    library = LoraLibrary(ModelSettings(path="pico", models_dir=str(models)), LoraSettings())
    with pytest.raises(InvalidRequest, match="a link out of the models folder"):
        library.uses(asked("link"))
    assert "link" not in library.available()


@pytest.mark.parametrize(
    "name", [b"\xff\xfe", b"new\nline", b"x" * 201, b"a.safetensors", b"back\\slash"]
)
def test_a_file_that_no_request_can_name_spoils_no_list(model, tmp_path, name):
    loras = tmp_path / "models" / "loras"
    loras.mkdir(parents=True)
    whole = Path(model.path) / "loras" / "both.safetensors"
    for each in (name, "日本 語é".encode()):
        shutil.copy(os.fsencode(whole), os.fsencode(loras) + b"/" + each + b".safetensors")
    library = LoraLibrary(ModelSettings(path="pico", models_dir=str(loras.parent)), LoraSettings())
    assert library.available() == ["日本 語é"]
    assert library.uses(asked("日本 語é")).denoise
    answer = json.dumps(shown_loras(library), ensure_ascii=False).encode()  # as /v1/status
    assert json.loads(answer) == {"available": ["日本 語é"]}


def test_together_they_may_have_no_more_ranks_than_there_is_room_for(model, library):
    names = [f"styles/s{number}" for number in range(8)]  # 16 * (1 + 1 + 1 + 2 + 2 + 1 + 1 + 3)
    with pytest.raises(InvalidRequest, match="have 192 ranks together") as raised:
        library.uses(asked(*names))
    assert raised.value.allowed == "at most 128 ranks (lora.ranks)"
    assert len(LoraLibrary(model, LoraSettings(ranks=256)).uses(asked(*names)).denoise) == 8
    with pytest.raises(InvalidRequest, match="ranks") as raised:
        LoraLibrary(model, LoraSettings(ranks=0)).uses(asked("both"))
    assert raised.value.allowed == "none: lora.ranks is 0"


def test_a_file_that_changes_is_another_version(model, tmp_path):
    folder = shutil.copytree(model.path, tmp_path / "pico")
    library = LoraLibrary(ModelSettings(path=str(folder)), LoraSettings())
    before = library.uses(asked("both")).denoise
    assert library.uses(asked("both")).denoise == before
    shutil.copy(
        folder / "loras" / "styles" / "s1.safetensors", folder / "loras" / "both.safetensors"
    )
    after = library.uses(asked("both"))
    assert after.denoise != before
    assert after.text == ()


def job(number: int = 0, *loras: LoraUse, **changes: Any) -> DenoiseJob:
    generator = np.random.default_rng(number)

    def prompt() -> PromptEmbedding:
        embeds = generator.standard_normal((13, 64)).astype(np.float32)
        pooled = generator.standard_normal(64).astype(np.float32)
        return PromptEmbedding(embeds, pooled, (), NOBODY)

    guided = number % 4 != 3
    fields: dict[str, Any] = {
        "job_id": str(number),
        "image": 0,
        "width": 64,
        "height": 64,
        "num_inference_steps": 2 + number % 5,
        "guidance_scale": 2.0 + number % 3 if guided else 1.0,
        "sampler": ("euler", "dpmpp_2m", "euler_ancestral")[number % 3],
        "scheduler": "normal",
        "shift": 3.0,
        "seed": number,
        "positive": prompt(),
        "negative": prompt() if guided else None,
        "loras": loras,
    }
    return DenoiseJob(**(fields | changes))


class Pico:
    """The model's transformer with room for LoRAs, in float32."""

    def __init__(self, model: ModelSettings, library: LoraLibrary, pages: int) -> None:
        self.mmdit = Mmdit.load(model.path, "cpu", "fp32")
        self.arena = self.mmdit.make_room_for_loras(pages)
        self.library = library
        self.vae = VaeDecoder.load(model.path, "cpu", "fp32")

    def run(self, *jobs: DenoiseJob) -> list[Latents | BaseException]:
        """Denoise jobs together; returns how each ended."""
        shelf = LoraShelf(self.arena, LoraFiles(self.library, self.arena))
        engine = Engine(self.mmdit, max_waiting=len(jobs), loras=shelf)
        heard: list[queue.Queue[Any]] = [queue.Queue() for _ in jobs]
        try:
            for each, ear in zip(jobs, heard, strict=True):
                engine.submit(each, ear.put)
            ends = []
            for ear in heard:
                while isinstance(event := ear.get(timeout=WAIT_S), StepProgress):
                    pass
                ends.append(event)
            return ends
        finally:
            engine.close()

    def pixels(self, end: Latents | BaseException) -> np.ndarray:
        assert isinstance(end, Latents), end
        return self.vae.decode(end.latents).astype(int)


def uses_of(library: LoraLibrary, *loras: Any) -> tuple[LoraUse, ...]:
    return library.uses(asked(*loras)).denoise


def test_twenty_requests_with_eight_loras_together_are_each_as_alone(model, library):
    """DESIGN.md's Pixels: in float32 at most 1/255 off on 99.9 % of the pixels.

    Fewer pages than all of the files take: files come and go, and some requests wait.
    """
    pico = Pico(model, library, pages=7)
    jobs = []
    for number in range(20):
        loras = [{"name": f"styles/s{number % 8}", "weight": 0.5 + 0.25 * (number % 4)}]
        if number % 6 == 0:
            loras.append({"name": "both", "weight": -0.5})
        jobs.append(job(number, *(uses_of(library, *loras) if number % 10 != 9 else ())))
    together = pico.run(*jobs)
    moved = 0
    for each, mixed in zip(jobs, together, strict=True):
        (alone,) = pico.run(each)
        off = np.abs(pico.pixels(mixed) - pico.pixels(alone))
        assert (off <= 1).mean() >= 0.999
        (plain,) = pico.run(job(int(each.job_id)))
        assert isinstance(mixed, Latents)
        assert isinstance(plain, Latents)
        distance = np.abs(mixed.latents - plain.latents).max()
        moved += bool(distance > 0.05)
        if not each.loras:
            assert distance < 1e-5
    assert moved == sum(bool(each.loras) for each in jobs)


def test_a_lora_whose_numbers_overflow_fails_its_request_and_no_other(model, library, tmp_path):
    folder = shutil.copytree(model.path, tmp_path / "pico")
    enormous = random_lora(BaseModel.of_folder(folder), 4, 3, "transformer", size=1e30)
    written(folder / "loras" / "enormous.safetensors", enormous)
    library = LoraLibrary(ModelSettings(path=str(folder)), LoraSettings())
    pico = Pico(model, library, pages=4)
    good = job(1, *uses_of(library, "styles/s1"), num_inference_steps=4)
    bad = job(2, *uses_of(library, "enormous"), num_inference_steps=4)
    ended, failed = pico.run(good, bad)
    assert "NaN, infinite or absurdly large" in str(failed)
    (alone,) = pico.run(good)
    assert np.abs(pico.pixels(ended) - pico.pixels(alone)).max() <= 1


def test_a_file_that_is_damaged_after_it_was_accepted_fails_its_request_and_no_other(
    model, tmp_path
):
    folder = shutil.copytree(model.path, tmp_path / "pico")
    library = LoraLibrary(ModelSettings(path=str(folder)), LoraSettings())
    good, bad = (job(n, *uses_of(library, f"styles/s{n}")) for n in (1, 2))
    path = folder / "loras" / "styles" / "s2.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    pico = Pico(model, library, pages=4)
    engine = Engine(
        pico.mmdit, max_waiting=2, loras=LoraShelf(pico.arena, LoraFiles(library, pico.arena))
    )
    try:
        with pytest.raises(InvalidRequest, match="'styles/s2': the file is cut short"):
            engine.submit(bad, lambda event: None)
        ear: queue.Queue[Any] = queue.Queue()
        engine.submit(good, ear.put)
        while isinstance(event := ear.get(timeout=WAIT_S), StepProgress):
            pass
        assert isinstance(event, Latents)
    finally:
        engine.close()


async def test_the_denoiser_makes_room_where_there_are_loras_and_says_what_it_holds(model, library):
    denoiser = Denoiser(model, PoolSettings(name="denoiser", torch_threads=1, precision="fp32"))
    assert denoiser.status()["loras"] == {"held": (), "ranks": 128}
    (use,) = uses_of(library, "styles/s3")
    latents = []
    for loras in ((), (use,)):
        async for events in denoiser.denoise(job(0, *loras)):
            last = events[-1]
        assert isinstance(last, Latents)
        latents.append(last.latents)
    assert np.abs(latents[0] - latents[1]).max() > 0.05
    assert denoiser.status()["loras"] == {"held": ("styles/s3",), "ranks": 128}
    assert isinstance(last, Latents)
    assert last.load is not None  # it travels with the work, and routing goes by it
    assert "lora:styles/s3" in last.load.holds


async def test_the_text_encoder_adapts_whose_prompts_name_one_and_keeps_them_apart(model, library):
    encoder = TextEncoder(model, PoolSettings(name="text", torch_threads=1, precision="fp32"))
    text = library.uses(asked("words", {"name": "both", "weight": 0.5})).text
    other = library.uses(asked({"name": "words", "weight": 2.0})).text

    async def encode(*jobs: TextJob) -> list[np.ndarray]:
        return [each.prompt_embeds for each in await encoder.encode(jobs)]

    prompt = "a red circle"
    plain = TextJob(prompt, prompt, prompt, 16)
    kinds = [
        plain,
        TextJob(prompt, prompt, prompt, 16, text),
        TextJob(prompt, prompt, prompt, 16, other),
    ]
    together = await encode(*kinds)
    again = await encode(*kinds)
    assert all(np.array_equal(one, two) for one, two in zip(together, again, strict=True))
    for one in range(3):
        for two in range(one):
            assert np.abs(together[one] - together[two]).max() > 1e-3
    fresh = TextEncoder(model, PoolSettings(name="text", torch_threads=1, precision="fp32"))
    (alone,) = await fresh.encode((plain,))
    assert np.array_equal(alone.prompt_embeds, together[0])
    with pytest.raises(InvalidRequest, match="There is no LoRA"):
        await encoder.encode((TextJob(prompt, prompt, prompt, 16, (LoraUse("gone", 1.0),)),))


async def test_loras_of_the_store_are_downloaded_once_and_again_when_they_change(
    model, s3: StorageSettings, tmp_path, monkeypatch
):
    storage = s3.model_copy(update={"prefix": f"{tmp_path.name}/"})
    settings = LoraSettings(s3_prefix="loras/", cache_dir=str(tmp_path / "cache"))
    store = ObjectStore(storage)
    source = Path(model.path) / "loras"

    async def put(name: str, path: Path) -> None:
        await store.put(f"loras/{name}", path.read_bytes(), "application/octet-stream")

    await put("far/away.safetensors", source / "both.safetensors")
    await put("broken.safetensors", source.parent / "model_index.json")
    library = LoraLibrary(model, settings, storage)
    assert {"far/away", "broken", "both"} < set(await asyncio.to_thread(library.available))
    first = await asyncio.to_thread(library.uses, asked("far/away"))
    assert first.denoise[0].name == "far/away"
    assert len(list((tmp_path / "cache" / "models").glob("*.json"))) == 1
    with pytest.raises(InvalidRequest, match="LoRA 'broken'"):
        await asyncio.to_thread(library.uses, asked("broken"))
    came: list[str] = []
    real = Transfer.fetch

    def noted(self: Transfer, wanted: Sequence[tuple[RemoteFile, int]]) -> Any:
        came.extend(file.key for file, _ in wanted)
        return real(self, wanted)

    monkeypatch.setattr(Transfer, "fetch", noted)
    other = LoraLibrary(model, settings, storage)  # another process of the node
    assert await asyncio.to_thread(other.uses, asked("far/away")) == first
    assert came == []
    await put("far/away.safetensors", source / "styles" / "s1.safetensors")
    changed = LoraLibrary(model, settings, storage)
    second = await asyncio.to_thread(changed.uses, asked("far/away"))
    assert second.denoise != first.denoise
    assert came == [f"{storage.prefix}loras/far/away.safetensors"]
    assert not list((tmp_path / "cache" / "files").glob("*.part*"))
    nowhere = storage.model_copy(
        update={"endpoint_url": "http://127.0.0.1:1", "max_attempts": 1, "connect_timeout_s": 1.0}
    )
    lost = LoraLibrary(model, settings, nowhere)
    with pytest.raises(StorageUnavailable):
        await asyncio.to_thread(lost.uses, asked("far/away"))
    assert (await asyncio.to_thread(lost.uses, asked("both"))).denoise  # the folder's still work
    store.close()
