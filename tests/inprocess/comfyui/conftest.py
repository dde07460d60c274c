"""A model under the file names that the workflows name."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from serve.comfyui_settings import ComfyuiSettings
from serve.config import StorageSettings
from serve.pipeline import Pipeline
from tests.inprocess.comfyui.caller import ENDS_WITHIN_S
from tests.inprocess.served import Served
from tests.inprocess.stand_in_stages import StandIn, new_pipeline


@pytest.fixture
def pipeline(
    stages: StandIn, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> Pipeline:
    names = {"sd3.5_large.safetensors": "m", "sd3.5_medium.safetensors": "m"}
    settings = ComfyuiSettings(checkpoints=names)
    return new_pipeline(stages, storage, monkeypatch, comfyui=settings)


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=ENDS_WITHIN_S) as client:
        yield client
