"""Settings of the job journal: who takes over whose jobs, and when."""

# No `from __future__ import annotations` here: Ray Serve's builder needs real annotations.
from pydantic import Field

from serve.heat_settings import Section
from serve.storage_settings import StorageSettings


class JournalSettings(Section):
    """The job journal and what lives by it."""

    enabled: bool = Field(
        True,
        description="false: records of jobs are kept in the Pipeline's memory and die with it",
    )
    storage: StorageSettings | None = Field(
        None,
        description="where records lie, if not with the pictures; needs conditional writes, which "
        "the pictures' store does without then",
    )
    lease_s: float = Field(
        15.0,
        ge=1.0,
        le=3600.0,
        allow_inf_nan=False,
        description="seconds without a sign of life after which a Pipeline's jobs are taken over",
    )
    recovered_at_once: int = Field(
        8, ge=1, description="jobs of dead Pipelines that a living one works on at a time"
    )
