"""`kelvin up` and `kelvin demo` as processes of their own: what they leave behind is nothing."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from serve.pictures import read_request
from tests.ray.conftest import wait_until

ROOT = Path(__file__).parents[2]
MARK = "TEST_CLI_MARK"


def test_up_serves_and_ctrl_c_stops_everything_it_started(tmp_path: Path) -> None:
    with _up(tmp_path) as (process, mark):
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert "url" in said, said
        assert httpx.get(f"{said['url']}/healthz", trust_env=False).status_code == 200
        assert len(_processes(mark)) > 3
        # To the whole group, as a terminal does it.
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert b"Traceback" not in errors
    assert _gone(mark), [_command(pid) for pid in _processes(mark)]


def test_demo_draws_what_it_was_asked_and_leaves_nothing_running(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    file = tmp_path / "new" / "demo.png"
    done = subprocess.run(
        [sys.executable, "-m", "serve", "demo", "--json", "-o", str(file)],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, MARK: mark, "KELVIN_STORAGE__ENDPOINT_URL": "http://not.used.example"},
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert set(said) == {"s3_uri", "url", "file", "prompt", "adherence", "seconds"}
    assert said["file"] == str(file)
    assert hashlib.sha256(file.read_bytes()).hexdigest() in said["s3_uri"]
    assert read_request(file).prompt == said["prompt"]
    stated = {"shape", "color", "size", "relation", "count"}
    assert stated | {"all_right"} == set(said["adherence"])
    # The demo's prompt and seed are fixed, so this is the same picture everywhere.
    assert said["adherence"] == dict.fromkeys(said["adherence"], True)
    assert _gone(mark), [_command(pid) for pid in _processes(mark)]


def test_sigterm_while_up_is_starting_leaves_nothing_behind(tmp_path: Path) -> None:
    with _up(tmp_path) as (process, mark):
        assert process.stderr is not None
        # The store and Ray's first processes: in the middle of the start.
        wait_until(lambda: len(_processes(mark)) > 3)
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert out == b""
    assert b"Traceback" not in errors
    assert _gone(mark), [_command(pid) for pid in _processes(mark)]


@contextmanager
def _up(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start `kelvin up` with pico; yield it and the mark that all its children inherit."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "serve", "up", "--model", "pico", "--port", "0", "--json"]
        + ["--set", f"embedded_store.data_dir={folder / 'data'}"],
        cwd=ROOT,
        env={**os.environ, MARK: mark},
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


def _processes(mark: str) -> list[int]:
    """Return the processes that inherited a variable's value."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue  # it ended meanwhile, or is not ours
    return found


def _gone(mark: str, within_s: float = 30.0) -> bool:
    deadline = time.monotonic() + within_s
    while _processes(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not _processes(mark)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
