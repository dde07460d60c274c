"""Keeps one child process alive exactly as long as the process that started this one.

Run as a plain script (standard library only, so that it starts in milliseconds):
`python store_guard.py COMMAND ...`. Its standard input is a pipe from the owner: one byte says
"the child is ready: from now on start it again when it dies", end of file says "stop". Even kill -9
of the owner closes the pipe. A parent-death signal in the child's own start would be simpler, but
it fires when the starting *thread* ends, and the owner may have many.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

_CHECK_S = 0.25  # how long a dead child may go unnoticed
_STOP_S = 5.0  # between asking the child to stop and killing it
_LONGEST_BACKOFF_S = 10.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> int:
    """Run the command until the owner goes; return the command's exit code if it never got up."""
    # Only the owner decides: Ctrl-C in its terminal must not stop the store before its users.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    told_to_stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told_to_stop.append(number))
    owner = os.getppid()
    child = _start(sys.argv[1:])
    ready = False
    died = 0
    while True:
        order = _read_order()
        if order == b"" or told_to_stop or os.getppid() != owner:
            _stop(child)
            return 0
        ready = ready or order is not None
        if child.poll() is None:
            continue
        if not ready:
            return child.returncode or 1
        died += 1
        time.sleep(min(_LONGEST_BACKOFF_S, 0.1 * 2**died))
        print(f"store_guard: the store died ({child.returncode}), starting it again", flush=True)
        child = _start(sys.argv[1:])


def _read_order() -> bytes | None:
    """Return a byte from the owner, b"" at end of file, None if there was nothing to read."""
    readable, _, _ = select.select([0], [], [], _CHECK_S)
    return os.read(0, 1) if readable else None


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    # close_fds=False: the lock on the data folder is inherited, so it is held until the last
    # process that may write there is gone.
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, close_fds=False, preexec_fn=_die_with_this_process
    )


def _die_with_this_process() -> None:
    # For kill -9 of this very process. Linux only; elsewhere the child would have to be found.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _stop(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
    try:
        child.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


if __name__ == "__main__":
    sys.exit(main())
