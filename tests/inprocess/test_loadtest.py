"""`kelvin loadtest`: every profile against a real service of pico, and its page in a browser."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtest.outcomes import read_outcome_file
from serve.__main__ import main
from tests.inprocess.chromium import chromium, opened, until
from tests.inprocess.local_service import Service

# Looked for and not imported: it patches whoever imports it.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("locust") is None, reason="needs locust: pip install -e '.[dev]'"
)

TRACE = "at_s,width,height,num_inference_steps,prompt\n0,64,80,2,a kite\n0.5,,,3,\n1,,,,a boat\n"
# Beside others on two cores even pico may be late; the tests are about what is told.
OPTIONS = ("--duration", "2", "--rate", "4", "--slo", "30", "--json")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def key(service: Service) -> str:
    return service.key()


@pytest.mark.parametrize("profile", ["steady", "step", "burst", "diurnal", "replay"])
def test_every_profile(
    service: Service,
    key: str,
    browser: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    profile: str,
):
    doors = {"steady": "mixed", "step": "openai", "burst": "comfyui"}
    options = ["--profile", profile, "--door", doors.get(profile, "native")]
    if profile == "replay":
        trace = tmp_path / "trace.csv"
        trace.write_text(TRACE)
        options += ["--trace", str(trace)]
    given = ["loadtest", "--url", service.url, "--api-key", key, "--out", str(tmp_path), *OPTIONS]
    code = main([*given, *options])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
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
    with opened(browser, (tmp_path / "report.html").as_uri()) as page:
        until(page, "[...document.images].every((each) => each.complete && each.naturalWidth)")
        assert page.inner_text("h1") == f"Load test: {profile} on {report['run']['model']}"
        assert page.locator("figure svg .line").count() >= 5
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        tile = page.inner_text(".tile >> nth=1")
        assert re.search(rf"{requests['right']} in all", tile)
        page.screenshot(path=tmp_path / f"{profile}.png", full_page=True)


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
        (("--slo", "inf"), "slo_s"),
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


def test_locust_works_alone(service: Service, key: str, tmp_path: Path):
    done = alone(service, key, "--rate", "6", "--duration", "1", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "POST /v1/generate" in done.stdout + done.stderr
    outcomes = read_outcome_file(tmp_path / "outcomes.jsonl")
    assert outcomes
    assert {each.error for each in outcomes} == {""}


def test_locust_alone_says_what_is_wrong(service: Service, key: str):
    done = alone(service, key, "--rate", "-1")
    assert done.returncode != 0
    assert "rate: -1.0; allowed: above 0" in done.stderr
    assert "Traceback" not in done.stderr


def alone(service: Service, key: str, *options: str) -> subprocess.CompletedProcess[str]:
    file = Path(__file__).parents[2] / "loadtest" / "locustfile.py"
    command = [sys.executable, "-m", "locust", "-f", str(file), "--host", service.url]
    environment = {**os.environ, "KELVIN_API_KEY": key}
    return subprocess.run(
        [*command, "--headless", *options], capture_output=True, text=True, env=environment
    )
