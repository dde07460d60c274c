"""What may be killed on this machine: Kelvin's processes by kind, found by Ray's own titles."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from typing import Literal, get_args

Kind = Literal["text", "denoise", "decode", "pipeline", "controller", "proxy", "store"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_TITLES: dict[str, str] = {
    "text": "ray::ServeReplica:kelvin:text-encoder",
    "denoise": "ray::ServeReplica:kelvin:denoiser",
    "decode": "ray::ServeReplica:kelvin:vae-decoder",
    "pipeline": "ray::ServeReplica:kelvin:pipeline",
    "controller": "ray::ServeController",
    "proxy": "ray::ProxyActor",
}


def processes(session_folder: str) -> dict[int, str]:
    """Return process id -> title of the workers of one Ray on this machine.

    Args:
        session_folder: Of that Ray; others may run beside it.
    """
    listing = subprocess.run(
        ["ps", "-eww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(maxsplit=2) for line in listing.stdout.splitlines()]
    raylets = {pid for pid, _, *args in rows if "/raylet" in args[0] and session_folder in args[0]}
    return {int(pid): args[0] for pid, parent, *args in rows if parent in raylets and args}


def kill_one(kind: Kind, session_folder: str, draw: random.Random) -> int | None:
    """Kill one process of a kind with SIGKILL; return its id, or None: there is none just now."""
    title = _TITLES[kind]
    found = [pid for pid, args in processes(session_folder).items() if args.startswith(title)]
    if not found:
        return None
    pid = draw.choice(sorted(found))
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return None
    return pid
