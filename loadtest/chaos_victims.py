"""What may be killed on this machine: Kelvin's processes by kind, found by Ray's own titles."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterable
from typing import Literal, get_args

Kind = Literal[
    "text", "denoise", "decode", "pipeline", "controller", "proxy", "raylet", "head", "store"
]
KINDS: tuple[Kind, ...] = get_args(Kind)

_TITLES: dict[str, str] = {
    "text": "ray::ServeReplica:kelvin:text-encoder",
    "denoise": "ray::ServeReplica:kelvin:denoiser",
    "decode": "ray::ServeReplica:kelvin:vae-decoder",
    "pipeline": "ray::ServeReplica:kelvin:pipeline",
    "controller": "ray::ServeController",
    "proxy": "ray::ProxyActor",
}
_RAYLET = "/raylet/raylet "
_GCS = "/gcs_server "


def kill_one(kind: Kind, session_folder: str, draw: random.Random) -> int | None:
    """Kill one worker process of a kind with SIGKILL.

    Args:
        kind: Any but raylet, head and store, which are no workers.
        session_folder: Of the Ray whose worker it is; others may run beside it.
        draw: Chooses among several.

    Returns:
        Its process id; None: there is none just now.
    """
    found = [pid for pid, title in _workers(session_folder) if title.startswith(_TITLES[kind])]
    if not found:
        return None
    pid = draw.choice(sorted(found))
    return pid if _killed([pid]) else None


def kill_raylet_of(parent: int) -> int | None:
    """Kill the raylet that a process started; return its id, or None: there is none."""
    found = [pid for pid, of, line in _listing() if of == parent and _RAYLET in line]
    return found[0] if _killed(found) else None


def kill_head(session_folder: str, owner: int) -> None:
    """Kill the head node of a Ray: where its cluster is kept, and the raylet beside it.

    Args:
        session_folder: Of that Ray.
        owner: The process that started the head.
    """
    _killed(
        pid
        for pid, parent, line in _listing()
        if parent == owner and session_folder in line and (_RAYLET in line or _GCS in line)
    )


def _workers(session_folder: str) -> list[tuple[int, str]]:
    """Return process id and title of the workers of all raylets of one Ray on this machine."""
    rows = _listing()
    raylets = {pid for pid, _, line in rows if _RAYLET in line and session_folder in line}
    return [(pid, line) for pid, parent, line in rows if parent in raylets]


def _listing() -> list[tuple[int, int, str]]:
    """Return process id, parent's id and command line of every process."""
    listing = subprocess.run(
        ["ps", "-eww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(maxsplit=2) for line in listing.stdout.splitlines()]
    return [(int(pid), int(parent), f"{' '.join(rest)} ") for pid, parent, *rest in rows]


def _killed(pids: Iterable[int]) -> bool:
    """Kill processes; return whether one was there."""
    killed = False
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        killed = True
    return killed
