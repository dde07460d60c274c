"""Where a request comes from: this machine, or a browser with a page of somebody else.

A page on the web can make its visitor's browser post to 127.0.0.1 and to the local network. Two
things give it away: the Origin header, which browsers set and pages cannot, and, where the page's
own name was made to resolve to our address (DNS rebinding), the Host header.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from serve.errors import ForeignOrigin
from serve.http.credentials import Scope, header
from serve.loopback import is_loopback_host

_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# Set by proxies: who sends them is not on this machine, wherever the connection comes from.
_FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip", b"via")


def is_of_this_machine(scope: Scope) -> bool:
    """Return whether a request was sent on this machine to this machine, not through a proxy."""
    ends = (scope.get("server"), scope.get("client"))
    return all(end is not None and is_loopback_host(end[0] or "") for end in ends) and all(
        header(scope, name) is None for name in _FORWARDED
    )


def refuse_foreign_page(scope: Scope, allowed_hosts: Collection[str]) -> None:
    """Refuse what a page from another origin sends; who is no browser sends no Origin.

    Args:
        scope: Of the request.
        allowed_hosts: Names of this service beside the one in Host.

    Raises:
        ForeignOrigin: It is one.
    """
    origin = header(scope, b"origin")
    if origin is None:
        is_unsafe = scope.get("method", "GET") not in _SAFE_METHODS
        if is_unsafe and header(scope, b"sec-fetch-site") == "cross-site":
            raise _foreign("sec-fetch-site", "cross-site")
        return
    scheme, host, port = _parts(origin)
    if host in allowed_hosts:
        return
    own = header(scope, b"host") or ""
    _, own_host, own_port = _parts(f"{scheme}://{own}")
    if not host or (host, port) != (own_host, own_port):
        raise _foreign("origin", origin)


def refuse_foreign_host(scope: Scope, allowed_hosts: Collection[str], *, loopback: bool) -> None:
    """Refuse a Host that only a page with a name of its own would send.

    Args:
        scope: Of the request, which needs no key.
        allowed_hosts: Names that are right.
        loopback: Whether the service is on this machine's loopback: then other addresses are wrong
            as well.

    Raises:
        ForeignOrigin: It is one.
    """
    told = header(scope, b"host") or ""
    _, host, _ = _parts(f"http://{told}")
    if host and (host in allowed_hosts or is_loopback_host(host)):
        return
    # Nobody can make an address, or a name without a dot, resolve to somewhere else.
    if host and not loopback and (_is_address(host) or "." not in host):
        return
    raise _foreign("host", told)


def _parts(url: str) -> tuple[str, str, int | None]:
    try:
        parts = urlsplit(url)
        if parts.username is not None or parts.path or parts.query:
            return "", "", None
        return parts.scheme, parts.hostname or "", parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return "", "", None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _foreign(field: str, value: str) -> ForeignOrigin:
    return ForeignOrigin(
        "This comes from a web page that is not this service's.",
        field=field,
        value=value,
        allowed="the address that the service listens on, or a name in http.allowed_hosts",
    )
