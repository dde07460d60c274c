"""Settings of the ComfyUI door."""

# No `from __future__ import annotations` here: Ray Serve's builder needs real annotations.
from typing import Final

from pydantic import Field

from serve.heat_settings import Section

COMFYUI: Final = "comfyui/"
"""What the keys of ComfyUI's prompts and of its named pictures begin with."""


class ComfyuiSettings(Section):
    """How workflows of ComfyUI meet the models that are served."""

    checkpoints: dict[str, str] = Field(
        {},
        description="file name in workflows: name of the served model that it means, "
        '`{"sd3.5_large.safetensors": "kelvin-builtin"}`; each model is known as NAME.safetensors',
    )
    previews: bool = Field(
        False,
        description="true: previews go to every websocket, as with `--preview-method auto`; "
        "else to who asks for them in `extra_data.preview_method`",
    )
