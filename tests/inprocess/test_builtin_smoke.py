"""The training script from end to end, in miniature: a crash late in a real run costs the model."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from deployments.builtin.dequantise import dequantized_directory

SCRIPT = [sys.executable, "-m", "deployments.builtin.train", "--smoke"]


def _events(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_smoke_run_leaves_a_model_that_diffusers_loads_and_can_be_resumed(tmp_path: Path):
    out = tmp_path / "first"
    subprocess.run([*SCRIPT, "--out", str(out), "--seed", "7"], check=True, timeout=300)
    events = _events(out)
    assert events[-1]["event"] == "done"
    assert {"vae_measured", "adherence", "checkpoint"} <= {str(e["event"]) for e in events}
    record = json.loads((out / "training.json").read_text())
    assert record["flow"]["steps"] == 8
    assert record["seed"] == 7
    assert (out / "samples.png").stat().st_size > 0
    plain = dequantized_directory(out / "model", tmp_path / "plain", torch.float32)
    vae = StableDiffusion3Pipeline.from_pretrained(plain).vae
    assert vae.config.scaling_factor == record["vae"]["scaling_factor"]

    again = tmp_path / "second"
    arguments = ["--out", str(again), "--resume", str(out), "--steps", "12"]
    subprocess.run([*SCRIPT, *arguments], check=True, timeout=300)
    flow = [event for event in _events(again) if event["event"] == "flow"]
    assert flow[0]["step"] == 9
    assert json.loads((again / "training.json").read_text())["flow"]["steps"] == 12
