"""Settings of what each tenant may use."""

# No `from __future__ import annotations` here: Ray Serve's builder needs real annotations.
from pydantic import Field, field_validator

from serve.heat_settings import Section
from serve.tenants import TENANT_NAME

_LEAST_A_MINUTE = 1e-3  # of pictures, one in 17 hours: so that when to come again can be said


class TenantLimits(Section):
    """What one tenant may use."""

    max_jobs: int | None = Field(
        None, ge=1, description="jobs of a tenant accepted and not ended at a time; none: no limit"
    )
    images_per_minute: float | None = Field(
        None,
        ge=_LEAST_A_MINUTE,
        allow_inf_nan=False,
        description="pictures of a tenant accepted a minute, saved up for a minute, or up to 16 "
        "pictures; none: no limit",
    )
    upload_mib_per_minute: float | None = Field(
        1024.0,
        ge=_LEAST_A_MINUTE,
        allow_inf_nan=False,
        description="MiB of start images that a tenant sends beforehand a minute, saved up for a "
        "minute; those within requests count as jobs do; none: no limit",
    )
    weight: float = Field(
        1.0,
        gt=0.0,
        le=1000.0,
        description="share of the denoisers while several tenants wait, beside others' weights",
    )


class NamedTenant(TenantLimits):
    """A tenant with limits of its own."""

    name: str = Field(pattern=f"^{TENANT_NAME}$", description="as its keys say")


class TenantSettings(TenantLimits):
    """What every tenant may use, unless it is named."""

    named: tuple[NamedTenant, ...] = Field(
        (), description="tenants with limits of their own, each all of its own"
    )

    @field_validator("named")
    @classmethod
    def _names_differ(cls, named: tuple[NamedTenant, ...]) -> tuple[NamedTenant, ...]:
        if len({each.name for each in named}) < len(named):
            raise ValueError("each tenant once")
        return named

    def of(self, tenant: str) -> TenantLimits:
        """Return a tenant's limits."""
        return next((each for each in self.named if each.name == tenant), self)
