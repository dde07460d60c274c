"""Settings of the spool: finished pictures on local disk while their store does not answer."""

# No `from __future__ import annotations` here: Ray Serve's builder needs real annotations.
from pydantic import Field, field_validator

from serve.heat_settings import Section


class SpoolSettings(Section):
    """Where finished pictures wait for a store that does not answer."""

    directory: str | None = Field(
        None,
        description="absolute, on each Pipeline's local disk; if absent "
        "/var/tmp/kelvin-spool-USERID",
    )
    mib: int = Field(
        1024,
        ge=0,
        description="MiB that may wait there; before that is used up nothing more is accepted; "
        "0 lets pictures wait in memory",
    )

    @field_validator("directory")
    @classmethod
    def _is_absolute(cls, directory: str | None) -> str | None:
        if directory is not None and not directory.startswith("/"):
            raise ValueError("an absolute path: a Pipeline's working directory is Ray's choice")
        return directory
