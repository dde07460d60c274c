"""API keys: 256 random bits each, of which only a SHA-256 digest is kept.

A digest without salt or stretching is enough for what nobody can guess, and lets a key be looked up
by it. Every key begins with `kelvin_`, so that one that strays into a text can be found and blotted
out.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time

from pydantic import BaseModel, ConfigDict, Field

from serve.tenants import TENANT_NAME, Caller, Role

_PREFIX = "kelvin_"
_RANDOM_BYTES = 32
_KEY = re.compile(rf"{_PREFIX}[A-Za-z0-9_-]{{43}}")
# Also of keys cut short or with something behind them.
_STRAY = re.compile(rf"{_PREFIX}[A-Za-z0-9_-]{{16,}}")
_ID_DIGITS = 12


class KeyRecord(BaseModel):
    """What is kept of a key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the key, hexadecimal")
    tenant: str = Field(pattern=f"^{TENANT_NAME}$")
    roles: tuple[Role, ...] = ("generate",)
    label: str = Field("", max_length=200, description="for people")
    created_at: float = Field(description="Unix seconds")

    @property
    def id(self) -> str:
        """Return the short name that `kelvin keys` lists and revokes it by; no secret."""
        return self.digest[:_ID_DIGITS]

    @property
    def caller(self) -> Caller:
        """Return who sends it."""
        return Caller(self.tenant, frozenset(self.roles))

    def is_of(self, key: str) -> bool:
        """Return whether this is the record of a key; takes the same time either way."""
        return hmac.compare_digest(self.digest, digest_of(key))


def new_key(tenant: str, roles: tuple[Role, ...], label: str = "") -> tuple[str, KeyRecord]:
    """Return a key, which nobody can find out again, and what is kept of it.

    Args:
        tenant: Whose it is.
        roles: What it allows.
        label: For people.
    """
    key = _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    record = KeyRecord(
        digest=digest_of(key), tenant=tenant, roles=roles, label=label, created_at=time.time()
    )
    return key, record


def is_key(text: str) -> bool:
    """Return whether this is of the form that `new_key` makes."""
    return _KEY.fullmatch(text) is not None


def digest_of(key: str) -> str:
    """Return the SHA-256 of a key, hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


def has_key(text: str) -> bool:
    """Return whether `without_keys` would change a text."""
    return _STRAY.search(text) is not None


def without_keys(text: str) -> str:
    """Return a text in which every key is blotted out."""
    return _STRAY.sub(f"{_PREFIX}***", text)
