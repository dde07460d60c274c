"""`kelvin loadtest`: every profile against a real service of pico, and its page in a browser."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from loadtest.load_plan import PlanOptions, make_plan
from loadtest.locust_process import offer
from loadtest.outcomes import read_outcome_file
from loadtest.picture_proof import NOT_A_PICTURE, WRONG_BYTES, WRONG_SIZE
from loadtest.request_mix import ModelFacts
from serve.__main__ import main
from tests.inprocess.chromium import chromium, opened, until
from tests.inprocess.local_service import Service

# Looked for and not imported: it patches whoever imports it.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("locust") is None, reason="needs locust: pip install -e '.[dev]'"
)

TRACE = "at_s,width,height,num_inference_steps,prompt\n0,64,80,2,a kite\n0.5,,,3,\n1,,,,a boat\n"
MODEL = ModelFacts("liar", 64, 64, 4, 1.0, "euler", "normal", 16, 64, 64)
# Beside others on two cores even pico may be late; the tests are about what is told.
OPTIONS = ("--duration", "2", "--rate", "4", "--slo", "30", "--json")


def load(
    service: Service, out: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, dict[str, Any]]:
    key = service.key()
    given = ["loadtest", "--url", service.url, "--api-key", key, "--out", str(out), *OPTIONS]
    code = main([*given, *options])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("profile", ["steady", "step", "burst", "diurnal", "replay"])
def test_every_profile(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str], profile: str
):
    doors = {"steady": "mixed", "step": "openai", "burst": "comfyui"}
    options = ["--profile", profile, "--door", doors.get(profile, "native")]
    if profile == "replay":
        trace = tmp_path / "trace.csv"
        trace.write_text(TRACE)
        options += ["--trace", str(trace)]
    code, report = load(service, tmp_path, capsys, *options)
    figures = report["figures"]
    assert code == 0, figures["errors"]
    assert figures["errors"] == {}
    assert report["ok"]
    requests = figures["requests"]
    assert requests["right"] == requests["due"] > 0
    assert figures["slo"]["attainment"] == 1.0
    assert figures["lateness"]["requests"] == requests["due"]
    assert report["generator"]["requests"] > 300
    assert report["generator"]["failed"] == 0
    assert figures["replicas"] == {
        pool: {"least": 1, "most": 1}
        for pool in ("denoiser-a", "denoiser-b", "text-encoder", "vae-decoder")
    }
    # The cards of a rehearsal are scripted, so their energy is not counted.
    assert figures["cards"]["temperature_c"]["most"] == 45
    if profile == "steady":
        assert set(figures["doors"]) == {"native", "openai", "comfyui"}
        assert any("handle user was skipped" in note for note in report["run"]["notes"])
    if profile == "replay":
        assert requests["due"] == 3
        assert {"2", "3"} <= set(figures["steps"])
        assert figures["sizes"]["64x80"] == 1
    html = (tmp_path / "report.html").read_text()
    assert html.count("data:image/webp") == min(requests["due"], 24)
    with chromium() as browser, opened(browser, (tmp_path / "report.html").as_uri()) as page:
        until(page, "[...document.images].every((each) => each.complete && each.naturalWidth)")
        assert page.inner_text("h1") == f"Load test: {profile} on {report['run']['model']}"
        assert page.locator("figure svg .line").count() >= 5
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        tile = page.inner_text(".tile >> nth=1")
        assert re.search(rf"{requests['right']} in all", tile)
        page.screenshot(path=tmp_path / f"{profile}.png", full_page=True)


class Door(BaseHTTPRequestHandler):
    """A front door that has its pictures already; how it answers is for others to say."""

    protocol_version = "HTTP/1.1"
    pictures: ClassVar[dict[str, bytes]] = {}

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def do_GET(self) -> None:
        self.send(200, self.pictures[self.path], "image/png")

    def answer(self, request: dict[str, Any]) -> None:
        raise NotImplementedError

    def send_result(self, name: str, promised: bytes | None = None) -> None:
        sha256 = hashlib.sha256(promised or self.pictures[name]).hexdigest()
        image = {"url": f"http://{self.headers['host']}{name}", "sha256": sha256}
        self.send(200, json.dumps({"id": "x", "images": [image]}).encode())

    def send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def picture(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "PNG")
    return file.getvalue()


Door.pictures = {
    "/64.png": picture(64),
    "/80.png": picture(80),
    "/broken.png": picture(64)[:-30],
}


class Liar(Door):
    """Is wrong in one of several ways, by the request's seed."""

    def answer(self, request: dict[str, Any]) -> None:
        way = request["seed"] % 5
        if way == 0:
            self.send(429, b"Too many requests", "text/plain")
        elif way == 1:
            self.send(503, json.dumps({"error": {"code": "stage_unavailable"}}).encode())
        elif way == 2:
            self.send_result("/80.png")
        elif way == 3:
            self.send_result("/64.png", b"another picture")
        else:
            self.send_result("/broken.png")


class OneAtATime(Door):
    """Takes its time for each, and lets the others wait."""

    pause_s = 0.15
    turn = threading.Lock()
    came: ClassVar[list[float]] = []

    def answer(self, request: dict[str, Any]) -> None:
        self.came.append(time.time())
        with self.turn:
            time.sleep(self.pause_s)
        self.send_result("/64.png")


@contextmanager
def listening(door: type[Door]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), door) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_whatever_is_not_the_picture_asked_for_is_found_and_told_apart(tmp_path: Path):
    plan = make_plan(PlanOptions(rate=25, duration_s=1), MODEL, ("native",))
    with listening(Liar) as url:
        outcomes = offer(url, plan, tmp_path).outcomes
    told = ("proxy_overloaded", "stage_unavailable", WRONG_SIZE, WRONG_BYTES, NOT_A_PICTURE)
    assert {each.number: each.error for each in outcomes} == {
        ask.number: told[ask.request["seed"] % 5] for ask in plan.asks
    }
    assert len({each.error for each in outcomes}) == 5


def test_a_slow_server_is_asked_no_less_and_its_queue_is_not_hidden(tmp_path: Path):
    plan = make_plan(PlanOptions(rate=20, duration_s=0.7), MODEL, ("native",))
    with listening(OneAtATime) as url:
        offered = offer(url, plan, tmp_path)
    assert {each.error for each in offered.outcomes} == {""}
    # All had come before the half of them were done.
    assert max(OneAtATime.came) - offered.began < OneAtATime.pause_s * len(plan.asks) / 2 + 0.7
    slowest = max(each.latency_s for each in offered.outcomes)
    assert slowest > OneAtATime.pause_s * len(plan.asks) - plan.asks[-1].at
    # Locust's own statistics say the same, in whole milliseconds: requests, failures, average,
    # least and most.
    row = re.search(
        r"POST /v1/generate\s+(\d+)\s+0\(0.00%\) \|\s+\d+\s+\d+\s+(\d+)",
        (tmp_path / "locust.log").read_text(),
    )
    assert row is not None
    assert int(row[1]) == len(plan.asks)
    assert int(row[2]) == pytest.approx(1000 * slowest, abs=2)


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    code = main(["loadtest", "--url", "http://127.0.0.1:9", "--out", str(tmp_path), "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert code == 1
    assert (error["field"], error["value"]) == ("url", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("--profile", "zigzag"), "profile"),
        (("--rate", "fast"), "rate"),
        (("--door", "back"), "door"),
        (("--profile", "replay", "--trace", "TRACE"), "trace.at_s"),
        (("--start", "--url", "http://a"), "url"),
        (("--model", "pico"), "model"),
        (("--require", "95"), "require"),
        (("--slo", "soon"), "slo_s"),
    ],
)
def test_wrong_options_are_told_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: tuple[str, ...], field: str
):
    trace = tmp_path / "trace.csv"
    trace.write_text("at_s\n5\n4\n")
    given = [str(trace) if each == "TRACE" else each for each in options]
    code = main(["loadtest", *given, "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert code == 2
    assert error["field"] == field
    assert error["allowed"]


def test_locust_works_alone(service: Service, tmp_path: Path):
    done = alone(service, "--rate", "6", "--duration", "1", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "POST /v1/generate" in done.stdout + done.stderr
    outcomes = read_outcome_file(tmp_path / "outcomes.jsonl")
    assert outcomes
    assert {each.error for each in outcomes} == {""}


def test_locust_alone_says_what_is_wrong(service: Service):
    done = alone(service, "--rate", "-1")
    assert done.returncode != 0
    assert "rate: -1.0; allowed: above 0" in done.stderr
    assert "Traceback" not in done.stderr


def alone(service: Service, *options: str) -> subprocess.CompletedProcess[str]:
    file = Path(__file__).parents[2] / "loadtest" / "locustfile.py"
    command = [sys.executable, "-m", "locust", "-f", str(file), "--host", service.url]
    environment = {**os.environ, "KELVIN_API_KEY": service.key()}
    return subprocess.run(
        [*command, "--headless", *options], capture_output=True, text=True, env=environment
    )
