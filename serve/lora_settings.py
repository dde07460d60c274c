"""Settings of LoRAs: how much room they get, and where they come from beside the models folder."""

# No `from __future__ import annotations` here: Ray Serve's builder needs real annotations.
from pydantic import Field

from serve.heat_settings import Section
from serve.path_text import PathText


class LoraSettings(Section):
    """LoRAs that requests may name: files in `loras` of the model's folder or of models_dir."""

    ranks: int | None = Field(
        None,
        ge=0,
        le=4096,
        description="room of each denoiser: the sum of the ranks it holds at a time, each LoRA's "
        "counted in sixteens; 0 takes none; if absent 128 where there are LoRAs when it starts",
    )
    s3_prefix: str | None = Field(
        None,
        pattern=r"^([^/]+/)+$",
        description="keys in the bucket, below storage.prefix, that are LoRAs too: `loras/`",
    )
    cache_dir: PathText | None = Field(
        None, description="folder of each node for those; ~/.cache/kelvin/loras if absent"
    )
    cache_mib: int = Field(
        8192, ge=64, description="MiB of it; the longest unused are deleted beyond them"
    )
