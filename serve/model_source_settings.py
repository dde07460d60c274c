"""From which S3 store a model's files come to a node, and how much of its disk they may take."""

# No `from __future__ import annotations` here: Ray Serve's builder needs real annotations.
from typing import Literal

from pydantic import Field

from serve.heat_settings import Section
from serve.path_text import PathText
from serve.storage_settings import StorageSettings


class ModelSourceSettings(Section):
    """Where `model.path` is `s3://bucket/prefix`: the store, and this node's cache."""

    endpoint_url: str | None = Field(None, description="S3 endpoint; AWS if absent")
    region: str = Field("us-east-1", description="the bucket's region; own stores mostly ignore it")
    credentials_file: str | None = Field(
        None,
        description="AWS shared-credentials file: its [default] profile and nothing else is used; "
        "boto3's usual chain if absent",
    )
    connect_timeout_s: float = Field(3.0, gt=0, description="seconds for a connection, each try")
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

    def storage(self, bucket: str) -> StorageSettings:
        """Return how a client for one bucket is made."""
        return StorageSettings(
            endpoint_url=self.endpoint_url,
            region=self.region,
            bucket=bucket,
            credentials_file=self.credentials_file,
            connect_timeout_s=self.connect_timeout_s,
            read_timeout_s=self.read_timeout_s,
            max_attempts=self.max_attempts,
        )
