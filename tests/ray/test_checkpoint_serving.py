"""ComfyUI's folders served end to end: `kelvin up` as its users would say it, and one picture."""

import json
import os
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from deployments.builtin.checker import check
from deployments.builtin.read import read_claims
from loadtest.checkpoint_formats import write_comfyui

ROOT = Path(__file__).parents[2]
BUILTIN = ROOT / "deployments" / "builtin" / "weights"
NAME = "stable-diffusion-3.5-fp8.safetensors"
# The demo's, with its seed.
PROMPT = "a large red circle left of a small blue square"


@pytest.mark.timeout(600)
def test_a_comfyui_folder_is_served_as_it_is(tmp_path: Path) -> None:
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
    command = [sys.executable, "-m", "serve", "up", "--json", "--port", "0"]
    command += ["--model", NAME, "--models-dir", str(models_dir)]
    command += ["--set", f"embedded_store.data_dir={tmp_path / 'data'}"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline() or b"{}")
        assert "url" in said, said
        with httpx.Client(base_url=said["url"], timeout=240, trust_env=False) as http:
            request = {"prompt": PROMPT, "seed": 1}
            answer = http.post("/v1/generate", json=request)
            assert answer.status_code == 200, answer.text
            result = answer.json()
            status = http.get("/v1/status").json()
        picture = httpx.get(result["images"][0]["url"], trust_env=False).content
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert result["request"]["model"] == NAME.removesuffix(".safetensors")
    (denoiser,) = status["stages"]["denoise"]
    assert denoiser["precision"].startswith("fp8 weights")
    with Image.open(BytesIO(picture)) as opened:
        verdict = check(np.asarray(opened.convert("RGB")), read_claims(PROMPT))
    assert verdict.all_right, verdict.seen
