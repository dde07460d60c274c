"""Tenants: whose a request is, and where what belongs to them lies.

A tenant is a name. Who is in the cluster and calls by handle is trusted to say it; over HTTP the
API key says it (`serve.keys`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, get_args

from serve.errors import InvalidRequest

Role = Literal["generate", "admin"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)

DEFAULT_TENANT = "default"
# Shorter than a job's id, beside which it stands in the keys of pictures.
TENANT_NAME = r"[a-z0-9][a-z0-9-]{0,30}"
TENANT_ALLOWED = "1 to 31 lower-case letters, digits and hyphens, no hyphen first"
_NAME = re.compile(TENANT_NAME)


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        tenant: Whose jobs and pictures they may see.
        roles: `generate` takes requests and cancels, `admin` sees the whole service.
    """

    tenant: str
    roles: frozenset[Role]


TRUSTED = Caller(DEFAULT_TENANT, frozenset(ROLES))
"""Who needs no key."""


def checked_tenant(name: object) -> str:
    """Return a tenant's name unchanged; it becomes part of object keys.

    Raises:
        InvalidRequest: It is none.
    """
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    raise InvalidRequest(
        "This is no tenant's name.", field="tenant", value=name, allowed=TENANT_ALLOWED
    )


def pictures_prefix(tenant: str) -> str:
    """Return what the keys of a tenant's pictures begin with, within the store's own prefix."""
    return "images/" if tenant == DEFAULT_TENANT else f"images/{checked_tenant(tenant)}/"
