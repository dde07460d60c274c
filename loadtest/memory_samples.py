"""The most anonymous memory that a process held meanwhile: mapped files do not count."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

_PERIOD_S = 0.01


def anonymous_bytes() -> int:
    """Return this process's resident anonymous memory now (Linux, `RssAnon`)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no RssAnon")


class AnonymousMemory:
    """A context that samples; afterwards `peak` and `before` hold bytes."""

    def __init__(self) -> None:
        self.before = self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> AnonymousMemory:
        self.before = self.peak = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())

    def _sample(self) -> None:
        while not self._done.wait(_PERIOD_S):
            self.peak = max(self.peak, anonymous_bytes())
