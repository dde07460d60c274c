"""A Pipeline on the stage classes themselves, in one process and without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deployments.denoiser import Denoiser
from deployments.text_encoder import TextEncoder
from deployments.vae_decoder import VaeDecoder
from serve.config import ModelSettings, Settings, StorageSettings
from serve.model_dir import resolve_model_dir
from serve.models import ModelSpec
from serve.pipeline import Pipeline
from serve.production import PipelineIdentity


class _Answer:
    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def __await__(self) -> Any:
        return self._answer.__await__()

    def __aiter__(self) -> Any:
        return self._answer

    def cancel(self) -> None:
        """Whoever listens no more closes the generator, which ends the work."""


class _Handle:
    """Ray's handle of one stage, which is an object of this process."""

    def __init__(self, stage: Any) -> None:
        self._stage = stage

    def options(self, **_: Any) -> _Handle:
        return self

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._stage, name)

        class Method:
            def remote(self, *given: Any, **options: Any) -> _Answer:
                return _Answer(method(*given, **options))

        return Method()


def real_pipeline(
    model: str | Path, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> Pipeline:
    """Return a Pipeline with its own stages.

    Args:
        model: `pico`, `builtin` or a folder.
        storage: Of a store that runs.
        monkeypatch: Undone when the Pipeline is no longer needed.
    """
    monkeypatch.setattr(
        PipelineIdentity, "of_this_process", classmethod(lambda cls: cls("p", 1, "n"))
    )
    own = ModelSettings(path=str(model))
    settings = Settings(storage=storage, model=own)
    stages: dict[str, Any] = {"text": TextEncoder, "denoise": Denoiser, "decode": VaeDecoder}
    handles: dict[str, Any] = {
        pool.name: _Handle(stages[stage](own, pool.model_copy(update={"torch_threads": 1})))
        for stage, pools in settings.pools.items()
        for pool in pools
    }
    return Pipeline(settings, ModelSpec.from_directory(resolve_model_dir(own)), handles)
