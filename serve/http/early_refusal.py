"""Under overload the proxy refuses by itself what the Pipeline would refuse, for a tenth of it.

To refuse a request takes Serve's proxy and a Pipeline some 15 to 20 ms of processor time, nearly
all of it Serve's: calls between processes, for the request, its body and its answer. Ten times too
many requests take most of two cores so, and what was accepted comes late. So `EarlyRefusal` stands
in front of the proxy. It sees what the Pipeline refuses, tells requests that differ in nothing but
prompt and seed the same, word for word (`cluster.load_shedder`), and keeps the line of those who
were told to come again; `StandsInLine` is its counterpart in the Pipeline's app. Without either
(the proxies know nothing of settings, so `pipeline.early_refusal` takes away the latter) all works
as well, at Serve's price.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import from_json
from starlette.responses import Response

from cluster.load_shedder import Ask, LoadShedder, Refusal
from serve.errors import KelvinError, Overloaded
from serve.http.answer_behind import AnswerBehind
from serve.http.credentials import cookie_key, header
from serve.http.origin import is_of_this_machine
from serve.outside_line import (
    LINE_HEADER,
    OutsideLine,
    refusal_to_header,
    standing_in,
)
from serve.requests import GenerateRequest

if TYPE_CHECKING:
    # Else each proxy would load what reads keys from a store.
    from serve.http.gate import App, Message, Receive, Send

_OWN_ROUTES: Final = ("/v1/generate", "/v1/jobs")
_ROUTES: Final = (*_OWN_ROUTES, "/v1/images/generations", "/sdapi/v1/txt2img")
# A larger body is no larger a job, but for its picture, which makes it unlike others anyway.
_LARGEST_BYTES = 16 * 1024
# Who sends a body slowly is dealt with where slow bodies are.
_ARRIVES_WITHIN_S = 0.1
_LONGEST_NUMBER = 20
# Of a header, all that says who comes in and whether the body is read; others anybody may make up
# anew for each request, and what stands between client and proxy does.
_MATTERS: Final = (b"authorization", b"content-type", b"host", b"origin", b"sec-fetch-site")


class EarlyRefusal:
    """ASGI middleware in front of Serve's proxy.

    Args:
        app: What is behind it.
        clock: Seconds, never going back.
    """

    def __init__(self, app: App, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._clock = clock
        self._shedder = LoadShedder()
        self._refused = 0  # of which no Pipeline knows yet

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on and see what becomes of it."""
        if "headers" in scope:
            # Only this proxy says it.
            scope = {**scope, "headers": [pair for pair in scope["headers"] if not _is_line(*pair)]}
        size = _body_bytes(scope)
        if size is None:
            await self._app(scope, receive, send)
            return
        begun = await _begin(receive)
        body = b"" if begun is None else begun.get("body", b"")
        ask = ask_of(scope, body) if len(body) == size else None
        if begun is not None:
            receive = _from(begun, receive)
        if ask is None:
            await self._app(scope, receive, send)
            return
        now = self._clock()
        is_turn = self._shedder.takes_turn(ask, now)
        said = None if is_turn else self._shedder.told(ask, now)
        if said is not None:
            self._refused += 1
            await _refuse(said, scope, receive, send)
            return
        line = OutsideLine(is_turn, self._shedder.places.expected_s(now), self._refused)
        self._refused = 0
        scope["headers"].append((LINE_HEADER, line.to_header().encode()))
        await self._app(scope, receive, AnswerBehind(self._heard(ask, is_turn, line), send))

    def _heard(
        self, ask: Ask, is_turn: bool, line: OutsideLine
    ) -> Callable[[int, Refusal | None], float]:
        """Return what takes note of an answer, and says when to come again if it is a refusal."""

        def heard(status: int, refusal: Refusal | None) -> float:
            if refusal is not None:
                return self._shedder.refused(ask, refusal, self._clock(), is_first=is_turn)
            if status < 400:
                self._shedder.accepted(ask)
            else:
                self._refused += line.refused  # whether anybody has read it is not known
            return 0.0

        return heard


class StandsInLine:
    """ASGI middleware of the Pipeline's app: what is said of the line, and what is said back.

    Args:
        app: What is behind it.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        said = header(scope, LINE_HEADER) if scope["type"] == "http" else None
        line = None if said is None else OutsideLine.from_header(said)
        if line is None:
            await self._app(scope, receive, send)
            return

        async def answered(message: Message) -> None:
            if message["type"] == "http.response.start" and line.refusal is not None:
                told = (LINE_HEADER, refusal_to_header(line.refusal).encode())
                message = {**message, "headers": [*message["headers"], told]}
            await send(message)

        with standing_in(line):
            await self._app(scope, receive, answered)


def ask_of(scope: Any, body: bytes) -> Ask | None:
    """Return what a request asks for, as others may ask for it too; None: it is like no other.

    Who sends an idempotency key may ask for a job that there is already, which is never refused.
    """
    try:
        asked = from_json(body)
    except ValueError:
        return None
    if not isinstance(asked, dict) or asked.get("idempotency_key") is not None:
        return None
    if header(scope, b"idempotency-key") is not None:
        return None
    route = next(route for route in _ROUTES if scope["path"].endswith(route))
    if not _is_sound(asked, route):
        return None
    path = scope["path"].removesuffix(route)
    said = [header(scope, name) for name in _MATTERS]
    whose = (path, said, cookie_key(scope), is_of_this_machine(scope))
    caller = _digest(repr(whose).encode())
    asked = {name: value for name, value in asked.items() if not _is_free(name, value)}
    rest = json.dumps([route, asked], sort_keys=True).encode()
    return Ask(caller, _digest(caller + rest), _digest(caller + route.encode() + b" " + body))


def _is_sound(asked: dict[str, Any], route: str) -> bool:
    """Return whether a request may be refused for want of room: it is not wrong anyway."""
    if route not in _OWN_ROUTES:
        return isinstance(asked.get("prompt"), str)
    try:
        GenerateRequest.model_validate(asked)
    except KelvinError:
        return False
    return True


def _is_free(name: str, value: Any) -> bool:
    """Return whether a field says nothing of how much work it is, nor whose."""
    if name == "seed":
        return type(value) is int
    # The web UI's prompts name LoRAs, in angle brackets.
    is_text = isinstance(value, str) and "<" not in value
    return is_text and name.startswith(("prompt", "negative_prompt"))


def _body_bytes(scope: Any) -> int | None:
    """Return how long a body is said to be; None: requests like this one are only passed on."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return None
    if not scope["path"].endswith(_ROUTES):
        return None
    size = header(scope, b"content-length") or ""
    if not (size.isascii() and size.isdigit()) or len(size) > _LONGEST_NUMBER:
        return None
    return int(size) if int(size) <= _LARGEST_BYTES else None


def _is_line(name: bytes, _: bytes) -> bool:
    return name.lower() == LINE_HEADER


async def _begin(receive: Receive) -> Message | None:
    """Return the first part of a body; None: it does not come at once."""
    try:
        async with asyncio.timeout(_ARRIVES_WITHIN_S):
            message = await receive()
    except TimeoutError:
        return None
    return message


def _from(begun: Message, receive: Receive) -> Receive:
    """Return what receives a message that was received already, and then what follows."""
    waiting = [begun]

    async def received() -> Message:
        return waiting.pop() if waiting else await receive()

    return received


async def _refuse(said: Refusal, scope: Any, receive: Receive, send: Send) -> None:
    """Answer as the service has answered a request like this one."""
    headers = {
        "Retry-After": str(math.ceil(said.wait_s)),
        # Serve's proxy, which gives each answer one, is not asked.
        "x-request-id": header(scope, b"x-request-id") or str(uuid.uuid4()),
    }
    response = Response(said.body, Overloaded.status, headers, "application/json")
    await response(scope, receive, send)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()
