"""`kelvin loadtest`: every profile against a real service of pico, and its page in a browser."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

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
