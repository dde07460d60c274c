"""What every process beneath this one holds: memory and file descriptors (Linux, /proc)."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_REPLICA = re.compile(r"ray::ServeReplica:[^:]*:([\w-]+)")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """One process at one moment.

    Attributes:
        pid: Its id.
        name: What it is: a stage's pool, `proxy`, `raylet` and so on.
        rss_bytes: Resident, shared pages included.
        shared_bytes: Of those, files and memory that others may map too.
        descriptors: Open file descriptors.
    """

    pid: int
    name: str
    rss_bytes: int
    shared_bytes: int
    descriptors: int


def processes(root: int | None = None) -> list[Process]:
    """Return all descendants of a process that live now, in order of their ids.

    Args:
        root: Whose; this process's if absent. It is not among them.
    """
    found = []
    for pid in sorted(_descendants(os.getpid() if root is None else root)):
        try:
            words = Path(f"/proc/{pid}/statm").read_text().split()
            process = Process(
                pid,
                _name(Path(f"/proc/{pid}/cmdline").read_bytes()),
                int(words[1]) * _PAGE,
                int(words[2]) * _PAGE,
                len(os.listdir(f"/proc/{pid}/fd")),
            )
        except (OSError, IndexError):
            continue  # it ended meanwhile
        if process.rss_bytes:  # else it has ended and nobody has asked how
            found.append(process)
    return found


def cpu_seconds(root: int) -> dict[str, float]:
    """Return the processor time so far of a process and its descendants that live, by name."""
    seconds: dict[str, float] = defaultdict(float)
    for pid in (root, *_descendants(root)):
        try:
            after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            name = _name(Path(f"/proc/{pid}/cmdline").read_bytes())
        except OSError:
            continue  # it ended meanwhile
        seconds[name] += (int(after[11]) + int(after[12])) / _TICKS_A_SECOND
    return dict(seconds)


def _descendants(root: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                # The second field is a name in brackets, which may hold anything.
                after = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(after[1]), []).append(int(entry))
    waiting = list(children.get(root, ()))
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += children.get(pid, ())


def _name(command_line: bytes) -> str:
    """Return what people call a process of this command line."""
    words = command_line.decode(errors="replace").split("\0")
    title = words[0].strip()
    if (replica := _REPLICA.match(title)) is not None:
        return replica[1]
    if title.startswith("ray::"):
        return title.removeprefix("ray::").partition(".")[0].partition(":")[0]
    program = Path(title).name
    if program.startswith("python") and len(words) > 1:
        scripts = [word for word in words[1:] if word.endswith(".py")]
        return Path(scripts[0]).stem if scripts else program
    return program or "?"
