"""Whose a namespace, folder or process of a test is, so that what a killed run left is removed.

Names tell the process that made a thing, and when that process began: no later one is both.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = "PLACED_ON"  # of the environment: owner, slash, host
NAMESPACES = Path("/run/netns")
_OWNER = re.compile(r"kelvin-(\d+)-(\d+)")
_ENDS_WITHIN_S = 60.0


def own_name() -> str:
    """Return what the names of all begin with that this process makes."""
    return f"kelvin-{os.getpid()}-{_began(os.getpid())}"


@contextmanager
def own_folder() -> Iterator[Path]:
    """Make a folder of a short path, for Unix sockets lie below it; remove it in the end."""
    folder = Path(tempfile.gettempdir(), own_name())
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers() -> None:
    """End what processes that are no more have started, and remove what they have made."""
    _end_all(lambda: processes(lambda process: is_left(mark_of(process))))
    for namespace in _left_in(NAMESPACES):
        end_all_in(namespace)
        # Another run may do the same at the same time.
        subprocess.run(["ip", "netns", "del", namespace.name], stderr=subprocess.DEVNULL)
    for folder in _left_in(Path(tempfile.gettempdir())):
        shutil.rmtree(folder, ignore_errors=True)


def is_left(name: str) -> bool:
    """Return whether something of this name was made by a process that is no more."""
    owner = _OWNER.match(name)
    return owner is not None and _began(int(owner[1])) != owner[2]


def processes(wanted: Callable[[Path], bool]) -> list[Path]:
    """Return the folders in /proc of processes; of those that end meanwhile nothing is known."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with suppress(OSError):
                if wanted(process):
                    found.append(process)
    return found


def mark_of(process: Path) -> str:
    """Return what a process inherited as its mark, or nothing."""
    for each in (process / "environ").read_bytes().split(b"\0"):
        if each.startswith(f"{MARK}=".encode()):
            return each.split(b"=", 1)[1].decode()
    return ""


def is_in(process: Path, namespace: Path) -> bool:
    """Return whether a process has a network namespace for its own."""
    return (process / "ns/net").stat().st_ino == namespace.stat().st_ino


def end_all_in(namespace: Path) -> None:
    """Kill what runs in a network namespace; what is started meanwhile, too."""
    _end_all(lambda: processes(lambda process: is_in(process, namespace)))


def end_all_marked(mark: str) -> None:
    """Kill what inherited a mark, likewise."""
    _end_all(lambda: processes(lambda process: mark_of(process) == mark))


def send(signal_number: int, to: list[Path]) -> None:
    """Send a signal to processes that may have ended."""
    for process in to:
        with suppress(ProcessLookupError):
            os.kill(int(process.name), signal_number)


def _end_all(found: Callable[[], list[Path]]) -> None:
    deadline = time.monotonic() + _ENDS_WITHIN_S
    while there := found():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not ended by SIGKILL: {[int(each.name) for each in there]}")
        send(signal.SIGKILL, there)
        time.sleep(0.02)


def _left_in(folder: Path) -> list[Path]:
    try:
        return [each for each in folder.glob("kelvin-*") if is_left(each.name)]
    except OSError:
        return []


def _began(pid: int) -> str | None:
    """Return when a process began, in ticks since the machine did; None: there is none."""
    try:
        # proc(5), stat: field 22; the second, a name, may have blanks and parentheses itself.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
