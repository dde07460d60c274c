"""From which S3 store a model's files come to a node, and how much of its disk they may take."""

# No `from __future__ import annotations` here: Ray Serve's builder needs real annotations.
from typing import Literal

from pydantic import Field

from serve.path_text import PathText
from serve.storage_settings import StoreConnection


class ModelSourceSettings(StoreConnection):
    """Where `model.path` is `s3://bucket/prefix`: the store, and this node's cache."""

    read_timeout_s: float = Field(20.0, gt=0, description="seconds of silence, each try")
    max_attempts: int = Field(6, ge=1, description="tries per S3 call, with backoff")
    connections: int = Field(16, ge=1, le=128, description="ranges that are read at once")
    cache_dir: PathText = Field(
        "~/.cache/kelvin/models", description="folder of each node, shared by all its replicas"
    )
    cache_gib: float = Field(
        100.0, gt=0, description="most of it, in GiB; models not used for longest go first"
    )
    verify: Literal["checksum", "size"] = Field(
        "size",
        description="of files that are in the cache already: `size` and time of change, or the "
        "`checksum`, which reads them whole; what is downloaded is always checked whole",
    )
