"""A Kelvin with pico on a real Ray, on a store of its own, and what tests ask of it.

The store is the tests' own and not Kelvin's embedded one, so that it can be taken away while
Kelvin serves.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from ray import serve

from serve.config import Settings, StorageSettings, load_settings
from serve.embedded_store import EmbeddedStore
from serve.local import LocalKelvin

FAST: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 7}
# So many steps that nothing ends by itself while a test looks at it.
ENDLESS: dict[str, Any] = {
    "prompt": "a blue square",
    "num_inference_steps": 200,
    "num_images": 16,
    "seed": 1,
}


class World:
    """The store, the Kelvin on it, and a client."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = EmbeddedStore(folder / "store", "pictures")
        self.store.start()
        self.kelvin: LocalKelvin | None = None
        self._asked: dict[str, Any] | None = None
        self.http = httpx.Client()

    @property
    def storage(self) -> StorageSettings:
        return self.store.storage_settings(StorageSettings())

    def settings(self, replicas: int = 1, **overrides: Any) -> Settings:
        def pool(name: str) -> list[dict[str, Any]]:
            return [{"name": name, "num_replicas": replicas, "torch_threads": 1}]

        return load_settings(
            overrides={
                "model": {"path": "pico"},
                "text_encoder": pool("text-encoder"),
                "denoiser": pool("denoiser"),
                "vae_decoder": pool("vae-decoder"),
                "http": {"port": 0},
                "storage": self.storage.model_dump(),
                "embedded_store": {"enabled": False},
                # Short, for tests wait for it; long enough for processes that get no processor.
                "journal": {"lease_s": 6.0},
                "spool": {"directory": str(self.store.data_dir.parent / "spool")},
                "lora": {"s3_prefix": "loras/", "cache_dir": str(self.folder / "loras")},
                **overrides,
            }
        )

    def have(self, replicas: int, **overrides: Any) -> None:
        """Go on with the Kelvin that runs if it was started so; else start another in its place."""
        asked = {"replicas": replicas, **overrides}
        if self._asked != asked:
            self.stop()
            self.start(**asked)

    def start(self, replicas: int, **overrides: Any) -> None:
        self.kelvin = LocalKelvin(self.settings(replicas, **overrides))
        self.kelvin.start()
        self._asked = {"replicas": replicas, **overrides}
        self.http = httpx.Client(base_url=self.kelvin.url, timeout=120, trust_env=False)

    def stop(self) -> None:
        self._asked = None
        self.http.close()
        if self.kelvin is not None:
            self.kelvin.stop()
            self.kelvin = None

    def close(self) -> None:
        self.stop()
        self.store.stop()

    @property
    def handle(self) -> Any:
        return serve.get_app_handle("kelvin")

    def generate(self, **fields: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/generate", json=FAST | fields)
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()
        return result

    def submit(self, **fields: Any) -> str:
        answer = self.http.post("/v1/jobs", json=FAST | fields)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def fetch(self, image: dict[str, Any]) -> bytes:
        answer = httpx.get(image["url"], trust_env=False)
        assert answer.status_code == 200, answer.text
        return answer.content

    def pixels(self, result: dict[str, Any], index: int = 0) -> NDArray[np.uint8]:
        return decoded(self.fetch(result["images"][index]))

    def replicas(self, stage: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.http.get("/v1/status").json()["stages"][stage]
        return found


def decoded(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


def wait_until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    """Poll until true; the limit is for machines that hang, no speed is asserted."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)
