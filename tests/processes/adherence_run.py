"""Pictures of fixed prompts by the built-in model, through HTTP and S3, judged by the checker.

A process of its own, because a process has one Ray, and the other tests' has another model.
"""

import hashlib
import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from deployments.builtin.world import check, read_claims
from serve.config import load_settings
from serve.local import LocalKelvin

PROMPTS = Path(__file__).with_name("core_prompts.txt").read_text(encoding="utf-8").splitlines()
FIRST_SEED = 1_000_003
# While one picture is denoised, the next is encoded and the last decoded and stored.
_IN_FLIGHT = 2


def main(data_dir: str) -> None:
    """Make a picture of every prompt and print the verdicts as one JSON object."""

    def pool(name: str) -> list[dict[str, Any]]:
        return [{"name": name, "torch_threads": 1}]

    settings = load_settings(
        overrides={
            "model": {"path": "builtin"},
            "text_encoder": pool("text-encoder"),
            "denoiser": pool("denoiser"),
            "vae_decoder": pool("vae-decoder"),
            "http": {"port": 0},
            "embedded_store": {"data_dir": data_dir},
        }
    )
    with (
        LocalKelvin(settings) as kelvin,
        httpx.Client(timeout=300, trust_env=False) as client,
        ThreadPoolExecutor(_IN_FLIGHT) as threads,
    ):

        def trial(index: int) -> dict[str, Any]:
            body = {"prompt": PROMPTS[index], "seed": FIRST_SEED + index}
            answer = client.post(f"{kelvin.url}/v1/generate", json=body)
            answer.raise_for_status()
            result = answer.json()
            (image,) = result["images"]
            fetched = client.get(image["url"]).raise_for_status().content
            with Image.open(io.BytesIO(fetched)) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            verdict = check(pixels, read_claims(PROMPTS[index]))
            return {
                "prompt": PROMPTS[index],
                "model": result["request"]["model"],
                "steps": result["request"]["num_inference_steps"],
                "size": [*pixels.shape[:2]],
                "sha256_holds": hashlib.sha256(fetched).hexdigest() == image["sha256"],
                "wrong": [name for name, right in verdict.attributes.items() if not right],
                "seen": verdict.seen,
            }

        trials = list(threads.map(trial, range(len(PROMPTS))))
    print(json.dumps(trials))


if __name__ == "__main__":
    main(*sys.argv[1:])
