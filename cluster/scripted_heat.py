"""Readings from a file instead of a card: for tests and rehearsals, and always marked as such.

`cluster.heat_script` says what stands in the file. A source reads it when it is made and again
whenever it changed, so the file can be rewritten while replicas run; its time, the file's `at_s`,
begins anew at each reading of the file, for each replica by its own clock. (Touching the file is a
change.) A file that became unreadable or wrong changes nothing: the last good one goes on, and the
readings say so.

Which replica is the n-th of its pool is settled by locks on files in a folder beside the script,
`<script>.claims/<pool>.<n>`: a replica takes the first that nobody holds and keeps it until it
ends. The operating system drops the lock of a process that is gone, however it went, so a new
replica takes the place of a dead one. Each machine counts its own replicas.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from cluster.heat_reading import Reading
from cluster.heat_script import HeatScript, HeatScriptError, parse_heat_script
from serve.errors import ConfigurationError

_RIGHT = "a YAML file as the documentation of cluster.heat_script describes"

_log = logging.getLogger(__name__)


class ScriptedHeat:
    """One replica's readings out of a script; a `cluster.thermal.HeatSource`.

    Args:
        path: The script.
        pool: The replica's pool.
        index: Of the replica in its pool, from 0; claimed beside the script if absent.
        clock: Seconds, never going back; `time.monotonic` also stamps the readings' ages.

    Raises:
        ConfigurationError: The script cannot be read or is wrong, or its folder takes no claims.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        pool: str = "",
        index: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = Path(path)
        self._pool = pool
        self._clock = clock
        self._problem: str | None = None
        try:
            self._script, self._seen = _read_script(self._path)
        except HeatScriptError as error:
            raise ConfigurationError(
                f"The script of the readings, {path}, is wrong: {error}.",
                field=f"thermal.script: {error.where}" if error.where else "thermal.script",
                value=error.value,
                allowed=_RIGHT,
            ) from None
        except OSError as error:
            raise ConfigurationError(
                f"Cannot read the script of the readings: {error}.",
                field="thermal.script",
                value=str(path),
                allowed=_RIGHT,
            ) from None
        self._began = clock()
        self._release: Callable[[], object] | None = None
        self._index = index if index is not None else self._claim_index()
        _log.warning("%s: nothing it says is true of any card", self.description)

    @property
    def index(self) -> int:
        """Which replica of its pool it is, from 0."""
        return self._index

    @property
    def description(self) -> str:
        """Where the readings come from, for people."""
        whose = f"{self._pool} replica" if self._pool else "replica"
        return f"scripted readings (a rehearsal): {self._path}, {whose} {self._index + 1}"

    @property
    def problem(self) -> str | None:
        """Why the last `read` gave nothing, in words; None if it gave something."""
        return self._problem

    def read(self) -> Reading | None:
        """Return what the script says now; None where it says nothing. Never raises."""
        problems = self._read_again()
        now = self._clock()
        point = self._script.point(self._pool, self._index, now - self._began)
        if point is None:
            self._problem = f"{self.description}: the script says nothing"
            return None
        self._problem = None
        return point.reading(now, problems)

    def close(self) -> None:
        """Give the claim back; the end of the process does the same."""
        if self._release is not None:
            self._release()

    def _read_again(self) -> tuple[str, ...]:
        try:
            if _stamp(self._path) == self._seen:
                return ()
            self._script, self._seen = _read_script(self._path)
        except (OSError, HeatScriptError) as error:
            # Perhaps it is just being written: the next reading tries again.
            return (f"script: {error}; the last good one goes on",)
        self._began = self._clock()
        _log.warning("%s: read again", self.description)
        return ()

    def _claim_index(self) -> int:
        claims = self._path.with_name(f"{self._path.name}.claims")
        prefix = re.sub(r"[^A-Za-z0-9_-]", "_", self._pool) or "any"
        try:
            claims.mkdir(exist_ok=True)
            index = 0
            while (claim := _lock(claims / f"{prefix}.{index}")) is None:
                index += 1
        except OSError as error:
            raise ConfigurationError(
                f"Cannot claim a place in the script of the readings: {error}.",
                field="thermal.script",
                value=str(self._path),
                allowed="a file in a folder that replicas may write to",
            ) from None
        self._release = weakref.finalize(self, os.close, claim)
        return index


def _lock(file: Path) -> int | None:
    """Return the open file, locked; None if somebody else holds it."""
    claim = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(claim)
        return None
    return claim


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read_script(path: Path) -> tuple[HeatScript, tuple[int, int, int]]:
    # Stamped before it is read: what is written meanwhile is read next time.
    stamp = _stamp(path)
    return parse_heat_script(path.read_bytes()), stamp
