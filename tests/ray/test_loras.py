"""LoRAs through all of Kelvin: named over HTTP, fetched from the store, seen in the picture."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.checkpoints.lora_file import BaseModel
from serve.config import ModelSettings
from serve.model_dir import resolve_model_dir
from serve.storage import ObjectStore
from tests.ray.world import FAST, World, wait_until
from tests.unit.lora_files import random_lora, written


@pytest.fixture(scope="module")
def loras(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two LoRAs and a broken one in the store."""
    folder = tmp_path_factory.mktemp("loras")
    base = BaseModel.of_folder(resolve_model_dir(ModelSettings(path="pico")))
    ink = random_lora(base, 4, 0, "transformer")
    words = random_lora(base, 4, 1, "transformer", "clip_l")
    files = [
        written(folder / f"{name}.safetensors", made)
        for name, made in (("ink", ink), ("words", words))
    ]
    (folder / "broken.safetensors").write_bytes(b"\x80\x04" + bytes(64))

    async def put(*paths: Path) -> None:
        store = ObjectStore(world.storage)
        for path in paths:
            await store.put(f"loras/styles/{path.name}", path.read_bytes(), "application/x")
        store.close()

    asyncio.run(put(*files, folder / "broken.safetensors"))
    # A Pipeline that listed them a moment ago does so again after seconds.
    wait_until(lambda: available(world) == ["styles/broken", "styles/ink", "styles/words"])
    return world


def available(world: World) -> list[str]:
    names: list[str] = world.http.get("/v1/status").json()["loras"]["available"]
    return names


def test_pictures_show_whose_loras_were_named_and_others_do_not(loras: World):
    def pixels(*names: Any) -> np.ndarray:
        result = loras.generate(loras=list(names), num_inference_steps=4)
        assert [each["name"] for each in result["request"]["loras"]] == [
            each if isinstance(each, str) else each["name"] for each in names
        ]
        return loras.pixels(result).astype(int)

    plain = pixels()
    ink, words = pixels("styles/ink"), pixels("styles/words.safetensors")
    both = pixels("styles/ink", {"name": "styles/words", "weight": -0.5})
    pictures = [plain, ink, words, both]
    for one in range(4):
        for two in range(one):
            assert np.abs(pictures[one] - pictures[two]).max() > 2
    assert np.abs(pixels() - plain).max() <= 1
    assert np.abs(pixels("styles/ink") - ink).max() <= 1
    wait_until(
        lambda: any("styles/ink" in each["loras"]["held"] for each in loras.replicas("denoise"))
    )


@pytest.mark.parametrize("route", ["/v1/generate", "/v1/jobs"])
@pytest.mark.parametrize(
    ("name", "words", "allowed"),
    [
        ("styles/nobody", "There is no LoRA", "one of: styles/broken, styles/ink, styles/words"),
        ("../secret", "would leave the folder", "one of: styles/broken"),
        ("styles/broken", "is a pickle", "a .safetensors LoRA for this model"),
    ],
)
def test_a_lora_that_cannot_be_used_is_refused_before_the_job_is_accepted(
    loras: World, route: str, name: str, words: str, allowed: str
):
    answer = loras.http.post(route, json=FAST | {"loras": [{"name": name}]})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["field"], error["value"]) == ("InvalidRequest", "loras", name)
    assert words in error["message"]
    assert allowed in error["allowed"]
    assert loras.generate()["images"]
