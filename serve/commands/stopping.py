"""Ctrl-C and SIGTERM as an exception, so that every `with` block closes what it started."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from serve.environment import exported

if TYPE_CHECKING:
    from serve.config import Settings
    from serve.local import LocalKelvin


class Stop(KeyboardInterrupt):
    """Somebody asked for an end, by Ctrl-C or SIGTERM."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stop in the main thread on SIGINT or SIGTERM, while inside; catch it outside."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _install()
    try:
        yield
    except SystemExit:
        # While Ray starts, a handler of its own for SIGTERM stands in the place of ours.
        raise Stop from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def local_kelvin(settings: Settings, *, may_join_cluster: bool = False) -> LocalKelvin:
    """Return a LocalKelvin, not started, whose Ray leaves SIGTERM to this process.

    Ray's core puts a handler under Python's that aborts the driver, and with it every `with` block;
    whether it does is read from the environment when Ray is imported, and only then, so that the
    processes Ray starts keep it.

    Args:
        settings: What to start.
        may_join_cluster: Whether RAY_ADDRESS counts. A demo must not replace what a cluster serves.
    """
    if not may_join_cluster:
        os.environ.pop("RAY_ADDRESS", None)
    with exported({"RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1"}):
        from serve.local import LocalKelvin
    return LocalKelvin(settings)


def end_process(code: int) -> NoReturn:
    """End this process without taking the interpreter down, after everything was closed.

    Ray's core now and then crashes in its destructors where its start was interrupted, and a clean
    stop would be reported as a segmentation fault.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def wait_for_stop() -> None:
    """Wait until Stop is raised; to be called inside `stoppable`."""
    _install()  # once more: Ray puts a Python handler in the place of ours while it starts
    threading.Event().wait()


def _install() -> None:
    signal.signal(signal.SIGINT, _raise_stop)
    signal.signal(signal.SIGTERM, _raise_stop)


def _raise_stop(number: int, frame: FrameType | None) -> None:
    # The second signal is for a stop that hangs: it acts as if nobody had asked for order.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Stop
