"""Which addresses are this machine itself: no proxy from the environment can reach those."""

from __future__ import annotations

import ipaddress
from typing import Final
from urllib.parse import urlsplit

DEFAULT_URL: Final = "http://127.0.0.1:8000"
"""Of a Kelvin on this machine, by the defaults of section `http`."""


def is_loopback(url: str | None) -> bool:
    """Return whether a URL's host is this machine; False for None and for what is no URL."""
    try:
        return is_loopback_host(urlsplit(url or "").hostname or "")
    except ValueError:
        return False


def is_loopback_host(host: str) -> bool:
    """Return whether a name or address, without brackets, is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
