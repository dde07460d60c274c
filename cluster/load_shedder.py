"""Which requests a front door refuses by itself, because equal ones are being refused behind it.

To refuse a request costs a service a multiple of what it costs its door: under overload that is
taken from the work it has promised. So whatever differs in nothing that matters from a request that
was refused a moment ago is told the same where it comes in, and given a place in the line
(`cluster.places`). Some are let through all the same, twice as many as the service gets done:
whatever room there is finds somebody to take it, and the door learns how things are. Where several
callers are refused they share that in equal parts, so who asks seldom is hardly kept waiting by
who asks always.

Pure: whoever calls says what time it is.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TypeVar

from cluster.places import Places

HOLDS_S = 1.0  # after a refusal equal requests are refused; what the service says renews it
_TRIED = 2.0  # times as many as get done
_IF_UNKNOWN_S = 0.2  # each keeps a service busy that has not got anything done yet
_MOST = 10_000

_Entry = TypeVar("_Entry")


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as its door tells it from others; digests.

    Attributes:
        caller: Who asks.
        kind: What they ask for, but for what does not matter here.
        key: Exactly this request.
    """

    caller: bytes
    kind: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a service said of a request that it refused.

    Attributes:
        wait_s: Seconds until there will be room for it.
        busy_s: Seconds that it would have kept the service busy; 0: the service does not know.
        body: What who asked was answered, and who asks for the same may be.
    """

    wait_s: float
    busy_s: float
    body: bytes = b""


@dataclass(slots=True)
class _Caller:
    refused_at: float
    tries_at: float


class LoadShedder:
    """Of one front door; not thread-safe.

    Attributes:
        places: Of those who were told to come again.
    """

    def __init__(self) -> None:
        self.places = Places()
        self._refused: OrderedDict[bytes, tuple[float, Refusal]] = OrderedDict()  # by kind
        self._callers: OrderedDict[bytes, _Caller] = OrderedDict()

    def takes_turn(self, ask: Ask, now: float) -> bool:
        """Return whether somebody was told to come now; then they have come."""
        if not self.places.is_turn(ask.key, now):
            return False
        self.places.came(ask.key)
        return True

    def told(self, ask: Ask, now: float) -> Refusal | None:
        """Return when to come again, and the body of the last answer; None: let it through."""
        self._forget(now)
        if (refused := self._refused.get(ask.kind)) is None:
            return None
        at, said = refused
        caller = self._callers.get(ask.caller)
        if caller is None or now >= caller.tries_at:
            if caller is not None:
                caller.tries_at = now + said.busy_s * len(self._callers) / _TRIED
            return None
        wait_s = said.wait_s - (now - at)
        wait_s = self.places.promise(ask.key, wait_s, said.busy_s, now, whose=ask.caller)
        return replace(said, wait_s=wait_s)

    def refused(self, ask: Ask, said: Refusal, now: float, *, is_first: bool) -> float:
        """Note that the service refused one, and return after how many seconds to come again.

        Args:
            ask: It.
            said: Why.
            now: Seconds.
            is_first: It had come in its turn.
        """
        said = replace(said, busy_s=said.busy_s or _IF_UNKNOWN_S)
        _renew(self._refused, ask.kind, (now, said))
        known = self._callers.get(ask.caller)
        _renew(self._callers, ask.caller, _Caller(now, known.tries_at if known else now))
        return self.places.promise(
            ask.key, said.wait_s, said.busy_s, now, whose=ask.caller, is_first=is_first
        )

    def accepted(self, ask: Ask) -> None:
        """Note that the service took one."""
        self.places.came(ask.key)

    def _forget(self, now: float) -> None:
        while self._refused and now - next(iter(self._refused.values()))[0] > HOLDS_S:
            self._refused.popitem(last=False)
        while self._callers and now - next(iter(self._callers.values())).refused_at > HOLDS_S:
            self._callers.popitem(last=False)


def _renew(table: OrderedDict[bytes, _Entry], key: bytes, value: _Entry) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > _MOST:
        table.popitem(last=False)
