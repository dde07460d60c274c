"""Hurts a running Kelvin at random moments, each kind of its parts equally often."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtest.chaos_load import Load
from loadtest.chaos_nodes import WorkerNodes
from loadtest.chaos_victims import Kind, kill_head, kill_one
from serve.config import Settings, StorageSettings
from serve.embedded_store import EmbeddedStore
from serve.local import LocalKelvin

_STORE_AWAY_S = (2.0, 6.0)
# Of all jobs, those that have ended at the first strike and at the last.
_FIRST, _LAST = 0.03, 0.9
_LOOK_S = 0.25
_SAY_S = 10.0
_VICTIM_APPEARS_S = 90.0
# Without any job's end; a start of everything on a busy machine takes a minute.
_STALLED_S = 180.0


class SpreadKelvin(LocalKelvin):
    """A LocalKelvin whose further nodes have joined before its replicas are placed."""

    def __init__(self, settings: Settings, nodes: WorkerNodes) -> None:
        super().__init__(settings)
        self._nodes = nodes

    def _start_app(self) -> None:
        self._cleanup.enter_context(self._nodes)
        super()._start_app()


class Target:
    """What can be hurt.

    Args:
        kelvin: Running, on a Ray that this process has started.
        store: Its store.
        nodes: Of that Ray, besides the head.
    """

    def __init__(self, kelvin: LocalKelvin, store: EmbeddedStore, nodes: WorkerNodes) -> None:
        self._kelvin = kelvin
        self._store = store
        self._nodes = nodes
        self._outage: threading.Thread | None = None
        self.url = kelvin.url
        self.storage: StorageSettings = kelvin.settings.storage

    def hurt(self, kind: Kind, draw: random.Random) -> bool:
        """Hurt a part of this kind; return whether there was one."""
        if kind == "store":
            self.recovered()
            self._outage = threading.Thread(
                target=self._take_store_away, args=(draw.uniform(*_STORE_AWAY_S),)
            )
            self._outage.start()
            return True
        if kind == "head":
            self.recovered()  # nothing starts without its store
            kill_head(_session(), os.getpid())
            self._nodes.kill()
            self._kelvin.stop()
            self._kelvin.start()
            return True
        if kind == "raylet":
            return self._nodes.kill_one(draw) is not None
        return kill_one(kind, _session(), draw) is not None

    def recovered(self) -> None:
        """Wait until the store is back."""
        if self._outage is not None:
            self._outage.join()
            self._outage = None

    def _take_store_away(self, seconds: float) -> None:
        self._store.stop()
        try:
            time.sleep(seconds)
        finally:
            self._store.start()


def _session() -> str:
    from ray._private.worker import _global_node

    if _global_node is None:
        raise RuntimeError("Ray runs elsewhere: what is not ours is not killed")
    return str(_global_node.get_session_dir_path())


@dataclass(frozen=True)
class Strike:
    """One part was hurt.

    Attributes:
        kind: What it was.
        at_s: When, in seconds of the run.
        ended: Jobs that had ended by then.
        took_s: Seconds until it was started again, where that is the attack's to do.
    """

    kind: Kind
    at_s: float
    ended: int
    took_s: float

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)


class Attack:
    """One run.

    When something is hurt is drawn in jobs that have ended, not in seconds, so that a slow machine
    is hurt as often as a quick one.

    Args:
        target: What is hurt.
        load: The jobs that it works on.
        seed: Of what is hurt when.
        say: Tells how far it is.
    """

    def __init__(self, target: Target, load: Load, seed: int, say: Callable[[str], None]) -> None:
        self._target = target
        self._load = load
        self._draw = random.Random(seed)
        self._say = say
        self._said_at = 0.0
        self._moved_at = 0.0
        self._ended = 0
        self.strikes: list[Strike] = []

    def run(self, rounds: int, kinds: Sequence[Kind], limit_s: float) -> str | None:
        """Hurt every kind so often, until all jobs have ended.

        Returns:
            Why it was given up, or None.
        """
        plan = list(self._plan(rounds, kinds))
        try:
            for ended, kind in plan:
                self._wait_for(ended, limit_s)
                self._strike(kind, limit_s)
            self._wait_for(self._load.number, limit_s)
        except Exception as error:  # whatever happened, what became of the jobs is to be told
            return f"{type(error).__name__}: {error}"
        finally:
            self._target.recovered()
        return None

    def _plan(self, rounds: int, kinds: Sequence[Kind]) -> Iterator[tuple[int, Kind]]:
        width = (_LAST - _FIRST) / rounds
        for number in range(rounds):
            begin = _FIRST + number * width
            moments = sorted(self._draw.uniform(begin, begin + width) for _ in kinds)
            shuffled = self._draw.sample(kinds, len(kinds))
            yield from (
                (round(moment * self._load.number), kind)
                for moment, kind in zip(moments, shuffled, strict=True)
            )

    def _strike(self, kind: Kind, limit_s: float) -> None:
        at_s, ended = self._load.now, len(self._load.ended)
        self._say(f"{at_s:6.1f} s  {kind} is hurt; {ended} jobs have ended")
        deadline = at_s + _VICTIM_APPEARS_S
        while not self._target.hurt(kind, self._draw):
            # Hurt a moment ago, and not there again yet.
            if self._load.now > deadline:
                raise TimeoutError(f"no {kind} has appeared within {_VICTIM_APPEARS_S:.0f} s")
            self._look(limit_s)
            at_s, ended = self._load.now, len(self._load.ended)
        self.strikes.append(Strike(kind, round(at_s, 2), ended, round(self._load.now - at_s, 2)))
        self._moved_at = self._load.now

    def _wait_for(self, ended: int, limit_s: float) -> None:
        while len(self._load.ended) < ended:
            self._look(limit_s)

    def _look(self, limit_s: float) -> None:
        """Say how far it is, and raise TimeoutError where it does not get on."""
        load = self._load
        now, ended = load.now, len(load.ended)
        if ended > self._ended:
            self._ended, self._moved_at = ended, now
        if now - self._said_at > _SAY_S:
            self._said_at = now
            self._say(f"{now:6.1f} s  {ended} of {load.number} jobs have ended")
        if load.failure is not None:
            raise TimeoutError(f"the clients have ended: {load.failure!r}")
        if now > limit_s:
            raise TimeoutError(f"not done within {limit_s:.0f} s")
        if now - self._moved_at > _STALLED_S:
            raise TimeoutError(f"no job has ended for {_STALLED_S:.0f} s")
        time.sleep(_LOOK_S)
