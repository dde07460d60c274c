"""How many calls each tenant may hold open: waiting, following, or sending a body slowly.

A Pipeline process takes so many calls at a time, and Serve lets any further one wait, probes too.
So nobody may take up all: where there are several tenants each may hold as many as it leaves free
(Choudhury and Hahne 1998, "Dynamic Queue Length Thresholds"), as with room for pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from serve.errors import Overloaded
from serve.tenants import DEFAULT_TENANT


class CallRoom:
    """The calls open in one process; on one event loop.

    Args:
        most: That may be open at a time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[str] = Counter()

    @contextmanager
    def held(self, tenant: str) -> Iterator[None]:
        """Hold a place for a tenant's call while the context lasts.

        Raises:
            Overloaded: There is none.
        """
        self._refuse_if_full(tenant)
        self._open[tenant] += 1
        try:
            yield
        finally:
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant]

    def _refuse_if_full(self, tenant: str) -> None:
        held, own = self._open.total(), self._open[tenant]
        is_shared = tenant != DEFAULT_TENANT or held > own
        if held < self._most and not (is_shared and own and own >= self._most - held):
            return
        raise Overloaded(
            f"{own} calls of this tenant are open here, {held} of all.",
            value=own + 1,
            allowed=f"no more than are left free of {self._most}: follow jobs, "
            "or ask for them now and then, instead of waiting in many calls",
        )
