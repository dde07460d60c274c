"""Which model to serve: the settings section `model`."""

# No `from __future__ import annotations` here: Ray Serve's builder needs real annotations.
from typing import Literal

from pydantic import Field

from serve.heat_settings import Section
from serve.model_source_settings import ModelSourceSettings
from serve.path_text import FileName, PathText
from serve.requests import Sampler, Scheduler

Variant = Literal["large", "large-turbo", "medium"]


class ModelSettings(Section):
    """Which model to serve."""

    path: PathText = Field(
        "builtin",
        description="`builtin`, `pico`, a folder in Diffusers layout or a .safetensors file, both "
        "readable on every node or at `s3://BUCKET/...`; with models_dir also the name of one of "
        "its checkpoints",
    )
    name: str | None = Field(None, description="name callers use; the folder's own name if absent")
    models_dir: PathText | None = Field(
        None, description="the `models` folder of ComfyUI: checkpoints, text_encoders, vae, loras"
    )
    text_encoders: tuple[FileName, ...] = Field(
        (), description="files of models_dir's text_encoders, instead of those that fit"
    )
    vae: FileName | None = Field(
        None, description="file of models_dir's vae, instead of the checkpoint's own"
    )
    tokenizers: PathText | None = Field(
        None,
        description="folder with tokenizer, tokenizer_2 and tokenizer_3, which single files lack; "
        "if absent, looked for in models_dir and in Hugging Face's cache",
    )
    variant: Variant | None = Field(
        None, description="whose defaults requests get; by tensors, metadata and name if absent"
    )
    width: int | None = Field(None, ge=16, multiple_of=16, description="default of requests")
    height: int | None = Field(None, ge=16, multiple_of=16, description="default of requests")
    num_inference_steps: int | None = Field(None, ge=1, le=200, description="default of requests")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="default of requests")
    sampler: Sampler | None = Field(None, description="default of requests")
    scheduler: Scheduler | None = Field(None, description="default of requests")
    shift: float | None = Field(None, gt=0, le=100, description="default of requests")
    max_size: int | None = Field(
        None, ge=16, description="longest side that requests may ask for; the position table's end"
    )
    source: ModelSourceSettings = Field(default_factory=ModelSourceSettings)

    @property
    def request_defaults(self) -> dict[str, int | float | str]:
        """Return what these settings state of the defaults and limits of requests."""
        names = ("width", "height", "num_inference_steps", "guidance_scale", "sampler")
        stated = self.model_dump(include={*names, "scheduler", "shift", "max_size"})
        return {name: value for name, value in stated.items() if value is not None}
