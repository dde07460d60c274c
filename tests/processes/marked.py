"""Kelvin as a process of its own, and what it started: all of it inherits a mark."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK = "TEST_CLI_MARK"


@contextmanager
def up(
    folder: Path, *arguments: str, **environment: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start `kelvin up --json` with its data in a folder; yield it and the mark."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "serve", "up", "--port", "0", "--json", *arguments]
    process = subprocess.Popen(
        [*command, "--set", f"embedded_store.data_dir={folder / 'data'}"],
        cwd=ROOT,
        env={**os.environ, **environment, MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process, mark
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def processes(mark: str) -> list[int]:
    """Return the processes that inherited a mark."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue  # it ended meanwhile, or is not ours
    return found


def left(mark: str, within_s: float = 30.0) -> list[str]:
    """Return the commands of those that are still there after a while."""
    deadline = time.monotonic() + within_s
    while (found := processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [_command(pid) for pid in found]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
