"""Settings of an S3 store: how one is reached, and that of pictures or of the journal."""

# No `from __future__ import annotations` here: Ray Serve's builder needs real annotations.
from pydantic import Field, field_validator

from serve.heat_settings import Section


class StoreConnection(Section):
    """How an S3 store is reached."""

    endpoint_url: str | None = Field(None, description="S3 endpoint; AWS if absent")
    region: str = Field("us-east-1", description="the bucket's region; own stores mostly ignore it")
    credentials_file: str | None = Field(
        None,
        description="AWS shared-credentials file: its [default] profile and nothing else is used; "
        "boto3's usual chain if absent",
    )
    connect_timeout_s: float = Field(3.0, gt=0, description="seconds for a connection, each try")
    read_timeout_s: float = Field(10.0, gt=0, description="seconds of silence, each try")
    max_attempts: int = Field(4, ge=1, description="tries per S3 call, with backoff")


class StorageSettings(StoreConnection):
    """Where pictures and job records live."""

    public_endpoint_url: str | None = Field(
        None, description="endpoint in presigned URLs, where callers see another one"
    )
    bucket: str = Field(
        "kelvin", min_length=3, max_length=63, description="must exist; the embedded store makes it"
    )
    prefix: str = Field("", description="key prefix inside the bucket, without leading slash")
    url_expiry_s: int = Field(
        3600, ge=1, le=604_800, description="how long presigned URLs work, in seconds"
    )

    @field_validator("prefix")
    @classmethod
    def _no_leading_slash(cls, prefix: str) -> str:
        stripped = prefix.strip("/")
        return f"{stripped}/" if stripped else ""
