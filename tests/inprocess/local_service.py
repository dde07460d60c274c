"""A whole service in this process, on a real socket: the Pipeline and the three real stages.

All but Ray: handles call the stage classes. Two denoisers, so that the cards of a rehearsal differ.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deployments.denoiser import Denoiser
from deployments.text_encoder import TextEncoder
from deployments.vae_decoder import VaeDecoder
from serve.checkpoints.lora_file import BaseModel
from serve.config import ModelSettings, Settings, StorageSettings, load_settings
from serve.key_store import FileKeys
from serve.keys import new_key
from serve.model_dir import resolve_model_dir
from serve.models import ModelSpec
from serve.pipeline import Pipeline
from serve.pipeline_identity import PipelineIdentity
from tests.inprocess.served import served
from tests.unit.lora_files import random_lora, written

COOL = {"temperature_c": 45, "limit_c": 85, "power_w": 300, "slowdown": 6.0}
LORAS: dict[str, tuple[str, ...]] = {
    "ink": ("transformer", "clip_l"),
    "styles/film": ("transformer",),
}
"""Name -> the parts that it adapts."""
# Of published workflows: under each the served model is found.
_CHECKPOINTS = (
    "sd3.5_large",
    "sd3.5_large_fp8_scaled",
    "sd3.5_large_turbo",
    "sd3.5_medium",
    "sd3_medium_incl_clips",
)
_TENANTS = 48


class _Answer:
    def __init__(self, made: Any) -> None:
        self._made = made

    def __await__(self) -> Any:
        return self._made.__await__()

    def __aiter__(self) -> AsyncIterator[Any]:
        answers: AsyncIterator[Any] = self._made
        return answers

    def cancel(self) -> None:
        pass


class _Statuses:
    def __init__(self, stage: Any) -> None:
        self._stage = stage

    async def results_async(self, timeout_s: float) -> list[dict[str, Any]]:
        return [await asyncio.to_thread(self._stage.status)]


class LocalHandle:
    """What the Pipeline uses of a Ray Serve handle, for one replica in this process."""

    def __init__(self, stage: Any) -> None:
        self._stage = stage

    def options(self, **_: Any) -> LocalHandle:
        return self

    def broadcast(self, method: str) -> _Statuses:
        assert method == "status"
        return _Statuses(self._stage)

    def __getattr__(self, method: str) -> Any:
        call = getattr(self._stage, method)

        class Method:
            def remote(self, *payload: Any, **options: Any) -> _Answer:
                return _Answer(call(*payload, **options))

        return Method()


@dataclass
class Service:
    """A running service whose callers need keys."""

    url: str
    heat: Path
    keys: list[str] = field(default_factory=list)

    def key(self) -> str:
        """Return the key of a tenant that has no jobs yet."""
        return self.keys.pop()

    def as_tenant(self, key: str) -> httpx.Client:
        shown = {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=shown, trust_env=False, timeout=60)

    def url_of(self, key: str) -> str:
        """Return what clients are given that can set a URL alone."""
        return f"{self.url}/k/{key}"

    def set_heat(self, **hot: Any) -> None:
        """Let one denoiser's card be different from the other's; as cool as it if empty."""
        part = self.heat.with_suffix(".part")
        pools = {"denoiser-a": {"default": COOL | hot}, "denoiser-b": {"default": COOL}}
        part.write_text(yaml.safe_dump({"pools": pools}))
        os.replace(part, self.heat)


@contextmanager
def local_service(storage: StorageSettings, folder: Path) -> Iterator[Service]:
    """Yield a service of pico, with keys for some tenants and a script of its cards' heat."""
    service = Service("", folder / "heat.yaml")
    service.set_heat()
    store = FileKeys(folder / "keys.json")
    for number in range(_TENANTS):
        key, record = new_key(f"tenant-{number}", ("generate", "admin"))
        asyncio.run(store.add(record))
        service.keys.append(key)
    models_dir = folder / "models"
    base = BaseModel.of_folder(resolve_model_dir(ModelSettings(path="pico")))
    for number, (name, parts) in enumerate(LORAS.items()):
        lora = random_lora(base, 4, number, *parts)
        written(models_dir / "loras" / f"{name}.safetensors", lora)
    settings = load_settings(
        overrides={
            "model": {"path": "pico", "models_dir": str(models_dir)},
            "comfyui": {"checkpoints": {f"{name}.safetensors": "pico" for name in _CHECKPOINTS}},
            "http": {"host": "0.0.0.0"},  # so that keys are asked for
            "keys": {"file": str(folder / "keys.json")},
            "thermal": {"source": "scripted", "script": str(service.heat), "period_s": 0.1},
            "denoiser": [
                {"name": name, "torch_threads": 1} for name in ("denoiser-a", "denoiser-b")
            ],
        }
    ).model_copy(update={"storage": storage})
    with listening(settings) as url:
        service.url = url
        yield service


@contextmanager
def listening(settings: Settings) -> Iterator[str]:
    """Yield the URL of a service with these settings."""
    spec = ModelSpec.from_directory(resolve_model_dir(settings.model))
    denoisers = [
        Denoiser(settings.model, pool, settings.thermal, settings.governor, settings.lora)
        for pool in settings.denoiser
    ]
    handles: dict[str, Any] = {
        **{
            pool.name: LocalHandle(denoiser)
            for pool, denoiser in zip(settings.denoiser, denoisers, strict=True)
        },
        **{
            pool.name: LocalHandle(TextEncoder(settings.model, pool, settings.lora))
            for pool in settings.text_encoder
        },
        **{
            pool.name: LocalHandle(VaeDecoder(settings.model, pool))
            for pool in settings.vae_decoder
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        identity = PipelineIdentity("local", os.getpid(), "here")
        patch.setattr(PipelineIdentity, "of_this_process", classmethod(lambda cls: identity))
        pipeline = Pipeline(settings, spec, handles)
    with served(pipeline) as running:
        try:
            yield running.url
        finally:
            for denoiser in denoisers:
                denoiser._engine.close()
                denoiser._heat.close()
