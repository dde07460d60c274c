"""One owner a data folder: a lock that lasts as long as any process that may write there.

The lock (flock) belongs to the open file, which the store's processes inherit. So when the owner
is killed, the next one waits the moment until the old store has really gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from serve.errors import ConfigurationError

_PATIENCE_S = 8.0  # for the processes of an owner that has died
_POLL_S = 0.05


class DataDirLock:
    """Held from construction to `release`.

    Raises:
        ConfigurationError: A living process owns the folder; its process id is in the message.
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + _PATIENCE_S
        while not self._try():
            owner = self._owner()
            if (owner is not None and _is_alive(owner)) or time.monotonic() > deadline:
                os.close(self._file)
                raise ConfigurationError(
                    f"Another process (pid {owner or 'unknown'}) runs an embedded store in "
                    "this folder.",
                    field="embedded_store.data_dir",
                    value=str(path.parent),
                    allowed="a folder of its own for each embedded store; or stop that process",
                )
            time.sleep(_POLL_S)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def fileno(self) -> int:
        """Return the descriptor that children must inherit."""
        return self._file

    def release(self) -> None:
        """Give the folder up, as far as this process goes."""
        with contextlib.suppress(OSError):
            os.close(self._file)

    def _try(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _owner(self) -> int | None:
        text = os.pread(self._file, 32, 0).decode("ascii", "replace").strip()
        return int(text) if text.isdecimal() else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
