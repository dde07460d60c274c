"""Whether starting would let in who should not be."""

from __future__ import annotations

import asyncio

from serve.config import Settings
from serve.errors import ConfigurationError
from serve.key_store import key_store
from serve.loopback import is_loopback_host


def refuse_open_door(settings: Settings) -> None:
    """Refuse to listen where others reach it while nobody has a key.

    Without keys nobody could come in anyway: it is said now rather than by a 401 to everybody.

    Raises:
        ConfigurationError: The address is not a loopback one, no key was made, and the settings do
            not say that it is meant so.
        StorageUnavailable: The store of keys does not answer.
    """
    http = settings.http
    if is_loopback_host(http.host) or http.open_to_all:
        return
    if not asyncio.run(key_store(settings).records()):
        raise ConfigurationError(
            f"Kelvin would listen on {http.host}, where others reach it, and there is no API key.",
            field="http.host",
            value=http.host,
            allowed="make one first with `kelvin keys create`, listen on 127.0.0.1, or let "
            "everybody in with http.open_to_all=true",
        )
