"""`kelvin loadtest` that somebody ends reports on what was measured, and touches nothing else."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.outcomes import read_outcome_file
from tests.inprocess import polling
from tests.inprocess.local_service import Service

# Looked for and not imported: it patches whoever imports it.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("locust") is None, reason="needs locust: pip install -e '.[dev]'"
)


def test_interrupted_it_reports_on_what_was_measured(service: Service, tmp_path: Path):
    key, out = service.key(), tmp_path / "o"
    # What others keep in a folder of that name stays.
    (out / "pictures").mkdir(parents=True)
    for name in ("holiday.png", "123456.png"):
        (out / "pictures" / name).write_text("mine")
    command = [sys.executable, "-m", "serve", "loadtest", "--url", service.url, "--api-key", key]
    command += ["--rate", "4", "--duration", "600", "--slo", "30", "--json", "--out", str(out)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        record = out / "outcomes.jsonl"
        try:
            asyncio.run(polling.until(lambda: len(read_outcome_file(record)) >= 3, 60))
            process.send_signal(signal.SIGINT)
            said, words = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, words
    report = json.loads(said.splitlines()[-1])
    assert 0 < report["run"]["interrupted_at_s"] < 600
    requests = report["figures"]["requests"]
    assert requests["right"] >= 3
    assert requests["failed"] == 0
    # What was due later is not counted as lost.
    assert requests["due"] < 600 * 4 / 2
    assert not report["ok"]
    html = (out / "report.html").read_text()
    assert "Interrupted after" in html
    assert (out / "pictures" / "holiday.png").read_text() == "mine"
    assert (out / "pictures" / "123456.png").read_text() == "mine"
    # The command can be typed again, and a report may be shown around.
    assert f"loadtest --url {service.url} --api-key kelvin_*** --rate 4" in report["run"]["command"]
    assert key not in html + json.dumps(report) + (out / "plan.json").read_text()
