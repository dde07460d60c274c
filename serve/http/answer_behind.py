"""What the service answers a request that was let through to it, as its front door sends it on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from cluster.load_shedder import Refusal
from serve.http.credentials import header
from serve.outside_line import LINE_HEADER, refusal_from_header

if TYPE_CHECKING:
    # Else each proxy would load what reads keys from a store.
    from serve.http.gate import Message, Send

_REWRITTEN: Final = (LINE_HEADER, b"retry-after")


class AnswerBehind:
    """What the service answers one request; of a refusal nothing is sent on until it is whole.

    Args:
        heard: Takes the status, and what is said of a refusal; returns seconds to wait then.
        send: Where it is sent.
    """

    def __init__(self, heard: Callable[[int, Refusal | None], float], send: Send) -> None:
        self._heard = heard
        self._send = send
        self._start: Message = {}  # of a refusal
        self._refusal: Refusal | None = None

    async def __call__(self, message: Message) -> None:
        """Take the next part of the answer."""
        if message["type"] == "http.response.start":
            said = header({"headers": message.get("headers", ())}, LINE_HEADER)
            self._refusal = None if said is None else refusal_from_header(said)
            if self._refusal is not None:
                self._start = message
                return
            self._heard(message["status"], None)
        elif self._refusal is not None:
            body = self._refusal.body + message.get("body", b"")
            self._refusal = replace(self._refusal, body=body)
            if message.get("more_body"):
                return
            wait_s = self._heard(self._start["status"], self._refusal)
            kept = [pair for pair in self._start["headers"] if pair[0].lower() not in _REWRITTEN]
            told = (b"retry-after", str(math.ceil(wait_s)).encode())
            await self._send({**self._start, "headers": [*kept, told]})
            message = {**message, "body": body}
        await self._send(message)
