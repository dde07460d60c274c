"""Ctrl-C and SIGTERM as an exception, so that every `with` block closes what it started."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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


def wait_for_stop() -> None:
    """Wait until Stop is raised; to be called inside `stoppable`."""
    _install()  # once more: Ray puts its own handler in the place of ours while it starts
    threading.Event().wait()


def _install() -> None:
    signal.signal(signal.SIGINT, _raise_stop)
    signal.signal(signal.SIGTERM, _raise_stop)


def _raise_stop(number: int, frame: FrameType | None) -> None:
    # The second signal is for a stop that hangs: it acts as if nobody had asked for order.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Stop
