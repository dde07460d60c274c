"""The one gate in front of every door: who comes in, and as whom.

It wraps the whole ASGI app, so a door added later is behind it without doing anything. Doors learn
who asks from `caller_of`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from starlette.requests import HTTPConnection

from serve.access_settings import HttpSettings
from serve.errors import Forbidden, KelvinError, Unauthenticated
from serve.http.credentials import Scope, cookie_key, header, presented_key
from serve.http.error_shapes import inner_path
from serve.http.errors import error_response
from serve.http.key_watch import still_counts, until_revoked
from serve.http.origin import is_of_this_machine, refuse_foreign_host, refuse_foreign_page
from serve.http.room import CallRoom, let_take
from serve.http.standing_paths import ADMIN, PUBLIC
from serve.key_ring import KeyRing
from serve.keys import is_key
from serve.loopback import is_loopback_host
from serve.tenants import TRUSTED, Caller, Role

_CALLER = "kelvin.caller"
_KEY_COUNTS = "kelvin.key_counts"

_READING = ("GET", "HEAD")
_DENIAL = "websocket.http.response"  # of ASGI: a handshake may be answered like any request

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]


class Gate:
    """ASGI middleware.

    Args:
        app: What is behind it.
        http: Where the service listens, and who needs no key.
        keys: The API keys.
        room: For calls that are open.
    """

    def __init__(self, app: App, http: HttpSettings, keys: KeyRing, room: CallRoom) -> None:
        self._app = app
        self._http = http
        self._keys = keys
        self._room = room

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Let a request in with its caller, or answer it with a typed error."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        scope = dict(scope)
        with ExitStack() as held:
            try:
                caller, key = await self._caller(scope)
                scope[_CALLER] = caller
                if key is not None:
                    scope[_KEY_COUNTS] = partial(still_counts, self._keys, key)
                if caller is not None and _takes_room(scope):
                    let_take(scope, held.enter_context(self._room.held(caller.tenant)))
            except KelvinError as error:
                await self._refuse(error, scope, receive, send)
                return
            serving = self._app(scope, receive, send)
            if scope["type"] == "websocket" and key is not None:
                await until_revoked(self._keys, key, serving, send)
            else:
                await serving

    async def _caller(self, scope: Scope) -> tuple[Caller | None, str | None]:
        """Return who asks, and the key that says so."""
        key = presented_key(scope)
        refuse_foreign_page(scope, self._http.allowed_hosts)
        if key and not is_key(key) and self._needs_no_key(scope):
            key = None  # of clients that always send one, made for another service
        cookie = cookie_key(scope) if key is None else None
        if key is not None or cookie is not None:
            shown = key or cookie or ""
            record = await self._keys.find(shown)
            if record is not None:
                _check_role(record.caller, scope)
                return record.caller, shown
            # A browser sends an old cookie wherever it goes, and must reach the page to log in.
            if key is not None or inner_path(scope) not in PUBLIC:
                raise _unauthenticated("The API key is wrong or was revoked.")
        if self._needs_no_key(scope):
            loopback = not self._http.open_to_all
            refuse_foreign_host(scope, self._http.allowed_hosts, loopback=loopback)
            return TRUSTED, None
        if inner_path(scope) in PUBLIC:
            return None, None
        raise _unauthenticated("An API key is needed.")

    def _needs_no_key(self, scope: Scope) -> bool:
        if self._http.open_to_all:
            return True
        # Serve may listen elsewhere than these settings say: each connection is looked at.
        return is_loopback_host(self._http.host) and is_of_this_machine(scope)

    async def _refuse(self, error: KelvinError, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and _DENIAL not in (scope.get("extensions") or {}):
            # The server makes a bare 403 of it.
            await send({"type": "websocket.close", "code": 1008, "reason": error.code})
            return
        response = error_response(error, scope)
        if error.status == Unauthenticated.status:
            response.headers.append("WWW-Authenticate", 'Bearer realm="kelvin"')
            if not _is_of_the_page(scope):
                response.headers.append("WWW-Authenticate", 'Basic realm="kelvin", charset="UTF-8"')
        await response(scope, receive, send)


def caller_of(connection: HTTPConnection) -> Caller:
    """Return who asks.

    Raises:
        Unauthenticated: Nobody said; so are all who do not come through the gate.
    """
    caller: Caller | None = connection.scope.get(_CALLER)
    if caller is None:
        raise _unauthenticated("An API key is needed.")
    return caller


def tenant_of(connection: HTTPConnection) -> str:
    """Return whose jobs who asks may see and make; raises as `caller_of`."""
    return caller_of(connection).tenant


def key_counts(connection: HTTPConnection) -> Callable[[], Awaitable[bool]]:
    """Return what tells whether the key that was shown still counts; who needs none stays."""
    counts: Callable[[], Awaitable[bool]] = connection.scope.get(_KEY_COUNTS, _always)
    return counts


async def _always() -> bool:
    return True


def is_known(connection: HTTPConnection) -> bool:
    """Return whether who asks has shown a key or needs none."""
    return connection.scope.get(_CALLER) is not None


def needed_role(method: str, path: str) -> Role | None:
    """Return the role that a route takes; None: any key will do.

    Args:
        method: In capitals.
        path: Without a key.
    """
    if path in PUBLIC:
        return None
    if path in ADMIN:
        return "admin"
    return None if method in _READING else "generate"


def _check_role(caller: Caller, scope: Scope) -> None:
    role = needed_role(scope.get("method", ""), inner_path(scope))
    if role is not None and role not in caller.roles:
        raise Forbidden(
            f"This takes an API key with the role {role}.",
            field="role",
            value=", ".join(sorted(caller.roles)),
            allowed=role,
        )


def _takes_room(scope: Scope) -> bool:
    # Probes are answered and jobs cancelled however full it is; neither takes long.
    return scope.get("method") != "DELETE" and inner_path(scope) not in PUBLIC


def _is_of_the_page(scope: Scope) -> bool:
    """Return whether a browser would ask for a password over the page, which has a login."""
    return cookie_key(scope) is not None or header(scope, b"x-requested-with") is not None


def _unauthenticated(message: str) -> Unauthenticated:
    return Unauthenticated(
        message,
        field="authorization",
        allowed="Authorization: Bearer KEY, the password of Basic, or the path /k/KEY/...; "
        "`kelvin keys create` makes keys",
    )
