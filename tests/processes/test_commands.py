"""`kelvin up` and `kelvin demo` as processes of their own: what they leave behind is nothing.

`up` serves ComfyUI's folders there, as its users would have it.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import uuid
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from deployments.builtin.checker import check
from deployments.builtin.read import read_claims
from loadtest.checkpoint_formats import write_comfyui
from serve.pictures import read_request
from tests.processes.marked import MARK, ROOT, left, processes, up
from tests.ray.world import wait_until

BUILTIN = ROOT / "deployments" / "builtin" / "weights"
NAME = "stable-diffusion-3.5-fp8.safetensors"
# The demo's, with its seed.
PROMPT = "a large red circle left of a small blue square"


@pytest.mark.timeout(600)
def test_up_serves_comfyui_checkpoints_as_they_are_and_ctrl_c_stops_all_it_started(
    tmp_path: Path,
) -> None:
    models_dir = tmp_path / "ComfyUI" / "models"
    write_comfyui(BUILTIN, models_dir, name=NAME)
    files = sorted(str(file.relative_to(models_dir)) for file in models_dir.rglob("*.safetensors"))
    assert files == [
        f"checkpoints/{NAME}",
        "text_encoders/clip_g.safetensors",
        "text_encoders/clip_l.safetensors",
        "text_encoders/t5xxl_fp8_e4m3fn.safetensors",
        "vae/sd35_vae.safetensors",
    ]
    model = ("--model", NAME, "--models-dir", str(models_dir))
    with up(tmp_path, *model, XDG_CACHE_HOME=str(tmp_path / "cache")) as (process, mark):
        assert process.stdout is not None
        said = json.loads(process.stdout.readline() or b"{}")
        assert "url" in said, said
        with httpx.Client(base_url=said["url"], timeout=240, trust_env=False) as http:
            assert http.get("/healthz").status_code == 200
            answer = http.post("/v1/generate", json={"prompt": PROMPT, "seed": 1})
            assert answer.status_code == 200, answer.text
            result = answer.json()
            status = http.get("/v1/status").json()
        picture = httpx.get(result["images"][0]["url"], trust_env=False).content
        assert len(processes(mark)) > 3
        # To the whole group, as a terminal does it.
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert b"Traceback" not in errors
    assert left(mark) == []
    assert result["request"]["model"] == NAME.removesuffix(".safetensors")
    (denoiser,) = status["stages"]["denoise"]
    assert denoiser["precision"].startswith("fp8 weights")
    with Image.open(BytesIO(picture)) as opened:
        verdict = check(np.asarray(opened.convert("RGB")), read_claims(PROMPT))
    assert verdict.all_right, verdict.seen


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
    assert left(mark) == []


def test_sigterm_while_up_is_starting_leaves_nothing_behind(tmp_path: Path) -> None:
    with up(tmp_path, "--model", "pico") as (process, mark):
        assert process.stderr is not None
        # The store and Ray's first processes: in the middle of the start.
        wait_until(lambda: len(processes(mark)) > 3)
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert out == b""
    assert b"Traceback" not in errors
    assert left(mark) == []
