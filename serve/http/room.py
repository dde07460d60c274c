"""How many calls each tenant may hold open: waiting, following, or sending a body slowly.

A Pipeline process takes so many calls at a time, and Serve lets any further one wait, probes too.
So nobody may take up all: where there are several tenants each may hold as many as it leaves free
(Choudhury and Hahne 1998, "Dynamic Queue Length Thresholds"), as with room for pictures. Of the
bytes of their bodies, which are kept as long as a call, the same holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Final

from serve.errors import Overloaded
from serve.tenants import DEFAULT_TENANT

_BODY_ROOM: Final = "kelvin.body_room"

TakeBytes = Callable[[int], None]
"""Takes up room for more bytes of a call's body; raises Overloaded where there is none."""


class CallRoom:
    """The calls open in one process; on one event loop.

    Args:
        most: That may be open at a time.
        most_bytes: That their bodies may have.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._open: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    @contextmanager
    def held(self, tenant: str) -> Iterator[TakeBytes]:
        """Hold a place for a tenant's call while the context lasts.

        Yields:
            What takes up room for its body, as that comes.

        Raises:
            Overloaded: There is none.
        """
        if not _has_room(tenant, self._open, 1, self._most):
            raise Overloaded(
                f"{self._open[tenant]} calls of this tenant are open here, "
                f"{self._open.total()} of all.",
                value=self._open[tenant] + 1,
                allowed=f"no more than are left free of {self._most}: follow jobs, "
                "or ask for them now and then, instead of waiting in many calls",
            )
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if not _has_room(tenant, self._bytes, size, self._most_bytes):
                raise Overloaded(
                    "The bodies of the calls that are open here take up too much memory.",
                    field="body",
                    value=self._bytes[tenant] + size,
                    allowed=f"no more bytes at a time than are left free of {self._most_bytes}",
                )
            self._bytes[tenant] += size
            taken += size

        self._open[tenant] += 1
        try:
            yield take
        finally:
            for count, own in ((self._open, 1), (self._bytes, taken)):
                count[tenant] -= own
                if not count[tenant]:
                    del count[tenant]


def let_take(scope: MutableMapping[str, Any], take: TakeBytes) -> None:
    """Let who reads a call's body take up room for it."""
    scope[_BODY_ROOM] = take


def take_bytes(scope: MutableMapping[str, Any], size: int) -> None:
    """Take up room for more bytes of a call's body, where the call holds a place.

    Raises:
        Overloaded: There is none.
    """
    if (take := scope.get(_BODY_ROOM)) is not None:
        take(size)


def _has_room(tenant: str, count: Counter[str], more: int, most: int) -> bool:
    held, own = count.total(), count[tenant]
    is_shared = tenant != DEFAULT_TENANT or held > own
    return held + more <= most and not (is_shared and own and own + more > most - held)
