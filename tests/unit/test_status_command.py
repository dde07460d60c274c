"""`kelvin status` against a server that tells of hot cards, of little, of nothing."""

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from serve.__main__ import main
from tests.unit.fake_kelvin import FakeKelvin, sends, served


@pytest.fixture
def kelvin() -> Iterator[FakeKelvin]:
    yield from served()


def denoiser(name: str, margin: float, **heat: Any) -> dict[str, Any]:
    return {
        "stage": "denoise",
        "pool": "denoiser",
        "replica": f"kelvin-{name}",
        "node": "0123456789abcdef",
        "device": "cuda",
        "queue_length": 3,
        "load": {"waiting_s": 2.0, "rows": 4, "duty": 1.0, "slowdown": 1.0},
        "heat": {"temperature_c": 90 - margin, "margin_c": margin, "power_w": 690.0, **heat},
    }


STATUS = {
    "model": {"name": "stable-diffusion-3.5-large"},
    "stages": {
        "text": [],
        "denoise": [denoiser("cool", 40.0), denoiser("warm", 2.0, throttled=True)],
    },
    "autoscaling": {
        "pools": {
            "denoiser": {"target": 4, "reason": "[bold]12 s of work wait[/]"},
            "text-encoder": {"reason": "fixed"},
        },
        "warnings": ["denoiser: a replica starts late"],
    },
    "pipeline": {"running_jobs": 7, "joules": 1500.0},
    "journal": {"durable": True, "lease_is_held": False},
    "spool": {"used_bytes": 30, "limit_bytes": 100, "waiting_pictures": 2},
    "further_models": {"medium": {"state": "loading"}},
}


def shown(
    capsys: pytest.CaptureFixture[str], kelvin: FakeKelvin, *options: str
) -> tuple[int, str, str]:
    code = main(("status", "--url", kelvin.url, *options))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("columns", ["200", "80", "40"])
def test_without_a_terminal_it_looks_once(
    capsys: pytest.CaptureFixture[str],
    kelvin: FakeKelvin,
    monkeypatch: pytest.MonkeyPatch,
    columns: str,
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    kelvin.on("GET", "/v1/status", sends(200, STATUS))
    code, out, err = shown(capsys, kelvin)
    assert (code, out) == (0, "")
    assert max(map(len, err.splitlines())) <= int(columns)
    assert len([path for _, path, _ in kelvin.seen if path == "/v1/status"]) == 1
    err = " ".join(err.split())
    if columns != "40":
        assert "2 -> 4" in err
        assert "lease lost" in err
        assert "2 wait for the store" in err
        assert "throttled" in err
        assert "a replica starts late" in err
        assert "[bold]12 s of" in err  # what the service tells is no markup
        assert err.index("warm") < err.index("cool")  # the hottest first


def test_for_machines_it_is_the_service_s_own_account(
    capsys: pytest.CaptureFixture[str], kelvin: FakeKelvin
) -> None:
    kelvin.on("GET", "/v1/status", sends(200, STATUS))
    code, out, _ = shown(capsys, kelvin, "--json")
    assert (code, json.loads(out)) == (0, STATUS)


def test_a_service_that_tells_little_is_shown(
    capsys: pytest.CaptureFixture[str], kelvin: FakeKelvin
) -> None:
    little = {"stages": {"denoise": [{"pool": "denoiser", "heat": None, "load": None}, 3]}}
    kelvin.on("GET", "/v1/status", sends(200, little))
    code, _, err = shown(capsys, kelvin, "--once")
    assert code == 0
    assert "denoiser" in err


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}"])
def test_something_else_that_answers_is_named(
    capsys: pytest.CaptureFixture[str], kelvin: FakeKelvin, body: bytes
) -> None:
    kelvin.on("GET", "/v1/status", sends(200, body))
    code, out, _ = shown(capsys, kelvin, "--json")
    assert code == 1
    assert json.loads(out)["error"]["type"] == "UnexpectedAnswer"


def test_nothing_that_answers_is_a_typed_error(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:  # bound, so that nobody else listens there
        taken.bind(("127.0.0.1", 0))
        code = main(("status", "--url", f"http://127.0.0.1:{taken.getsockname()[1]}", "--json"))
    assert code == 1
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "ServerUnreachable"


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon", "1e9"])
def test_a_bad_refresh_is_named(capsys: pytest.CaptureFixture[str], seconds: str) -> None:
    code = main(("status", "--refresh", seconds, "--json"))
    assert code == 2
    assert json.loads(capsys.readouterr().out)["error"]["field"] == "refresh"


def test_on_a_terminal_it_goes_on_through_an_outage_until_interrupted(kelvin: FakeKelvin) -> None:
    later = {**STATUS, "model": {"name": "later"}}
    down = {"error": {"type": "StageUnavailable", "message": "Away for a while."}}
    kelvin.on("GET", "/v1/status", sends(200, STATUS), sends(503, down), sends(200, later))
    ours, theirs = pty.openpty()
    # As a script starts it that goes on beside it.
    ignoring = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
    command = [sys.executable, "-m", "serve", "status", "--url", kelvin.url, "--refresh", "0.2"]
    environment = {**os.environ, "COLUMNS": "120", "LINES": "30", "TERM": "xterm"}
    with subprocess.Popen(
        [*ignoring, *command], stderr=theirs, stdin=theirs, env=environment
    ) as running:
        os.close(theirs)
        try:
            seen = _until(ours, b"later")
            assert b"Away for a while." in seen
            assert b"stable-diffusion-3.5-large" in seen
            running.send_signal(signal.SIGINT)
            assert running.wait(30) == 0
        finally:
            running.kill()
            os.close(ours)


def _until(terminal: int, words: bytes) -> bytes:
    seen, deadline = b"", time.monotonic() + 60
    while words not in seen and time.monotonic() < deadline:
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 65536)
    return seen
