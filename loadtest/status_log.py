"""A service's own account of itself during a load: `/v1/status`, once a second, in a thread."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from serve.client import Kelvin
from serve.errors import KelvinError

_PERIOD_S = 1.0
_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class StatusSample:
    """One look.

    Attributes:
        at: By `time.time`.
        waiting_s: Stage -> seconds of work that waits, of a replica's on average.
        replicas: Pool -> how many answered; a pool none of whose did is not in it.
        cards: Replica -> its card's `temperature_c` and `power_w`, as far as they are read.
    """

    at: float
    waiting_s: dict[str, float]
    replicas: dict[str, int]
    cards: dict[str, dict[str, float]]


def sample_of(status: dict[str, Any], at: float) -> StatusSample:
    """Return what a status says; further models' replicas count with the service's own."""
    replicas = [
        each
        for told in (status, *status.get("further_models", {}).values())
        for stage in told.get("stages", {}).values()
        for each in stage
    ]
    stages: dict[str, list[float]] = {}
    pools: dict[str, int] = {}
    cards = {}
    for each in replicas:
        waits = (each.get("load") or {}).get("waiting_s") or 0.0
        stages.setdefault(each["stage"], []).append(waits)
        pools[each["pool"]] = pools.get(each["pool"], 0) + 1
        heat = each.get("heat") or {}
        read = {name: heat.get(name) for name in ("temperature_c", "power_w")}
        if known := {name: float(value) for name, value in read.items() if value is not None}:
            cards[str(each["replica"])] = known
    waiting_s = {stage: sum(values) / len(values) for stage, values in stages.items()}
    return StatusSample(at, waiting_s, pools, cards)


class StatusLog:
    """Samples from entry to exit of the context.

    Args:
        url: Of the service.
        api_key: Where it asks for one; it needs the role `admin`.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        self.samples: list[StatusSample] = []
        self.problem = ""
        """Why there are none, or fewer."""
        self._client = Kelvin(url, api_key=api_key, timeout_s=_TIMEOUT_S)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="status-log", daemon=True)

    def __enter__(self) -> StatusLog:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._client.close()

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                # Stamped before, because a service under load takes its time to answer.
                at = time.time()
                self.samples.append(sample_of(self._client.status(), at))
            except KelvinError as error:
                self.problem = error.message
            except (KeyError, TypeError, ValueError) as error:
                self.problem = f"/v1/status is not what it should be: {error!r}"
            self._stop.wait(_PERIOD_S)
