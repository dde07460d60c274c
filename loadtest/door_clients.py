"""One caller a door, each as its own clients go about it, and each with the picture in the end.

All that is compared asks for the same picture and has the file of it in hand when it stops waiting:
OpenAI's and AUTOMATIC1111's doors send it within the answer, the others name it and it is fetched.
Every caller keeps its connection. The clients proper (`openai`, `webuiapi`) are not used here: what
they cost is theirs.
"""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from serve.errors import KelvinError
from serve.requests import GenerateRequest

Caller = Callable[[int], bytes]
"""Asks for the picture of a seed, waits, and returns its file."""

_TIMEOUT_S = 60.0
_CLIENT = "loadtest-doors"


class DoorFailed(KelvinError):
    """A door answered something that is no picture."""

    code = "door_failed"


@dataclass(frozen=True)
class Asked:
    """The picture that all ask for, but for its seed; `model` by the name the service gives it."""

    model: str
    prompt: str
    side: int  # pixels
    steps: int
    guidance_scale: float

    def request(self, seed: int) -> GenerateRequest:
        """Return it in Kelvin's own words."""
        return GenerateRequest(
            prompt=self.prompt,
            width=self.side,
            height=self.side,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            sampler="euler",
            scheduler="normal",
            seed=seed,
        )


class Connection:
    """One connection to one server, kept; a context."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._http = http.client.HTTPConnection(
            parts.hostname or "", parts.port, timeout=_TIMEOUT_S
        )

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def ask(self, method: str, path: str, body: Any = None) -> bytes:
        """Send JSON and return the body of the answer.

        Raises:
            DoorFailed: The status is not 200.
        """
        data = None if body is None else json.dumps(body).encode()
        self._http.request(method, path, data, {"Content-Type": "application/json"})
        response = self._http.getresponse()
        answer = response.read()
        if response.status != 200:
            raise DoorFailed(
                f"{method} {path}: HTTP {response.status}.", value=answer[:500].decode("latin-1")
            )
        return answer


def own_model(connection: Connection) -> str:
    """Return the name of the service's own model, which need not be that of its settings."""
    models = json.loads(connection.ask("GET", "/v1/models"))["models"]
    return next(str(model["name"]) for model in models if model["is_own"])


def handle(service: Any, asked: Asked) -> Caller:
    """Return the caller through Ray Serve's handle of the service: what doors are compared with."""

    def call(seed: int) -> bytes:
        result = service.generate.remote(asked.request(seed)).result(timeout_s=_TIMEOUT_S)
        picture: bytes = service.picture.remote(result.images[0]).result(timeout_s=_TIMEOUT_S)
        return picture

    return call


def native(connection: Connection, asked: Asked) -> Caller:
    """Return the caller of Kelvin's own routes."""

    def call(seed: int) -> bytes:
        body = asked.request(seed).model_dump(exclude_unset=True)
        job = json.loads(connection.ask("POST", "/v1/generate", body))["id"]
        return connection.ask("GET", f"/v1/jobs/{job}/images/0")

    return call


def openai(connection: Connection, asked: Asked) -> Caller:
    """Return the caller of OpenAI's Images API."""

    def call(seed: int) -> bytes:
        body = asked.request(seed).model_dump(exclude_unset=True, exclude={"width", "height"})
        body["size"] = f"{asked.side}x{asked.side}"
        answer = json.loads(connection.ask("POST", "/v1/images/generations", body))
        return base64.b64decode(answer["data"][0]["b64_json"])

    return call


def a1111(connection: Connection, asked: Asked) -> Caller:
    """Return the caller of AUTOMATIC1111's API."""

    def call(seed: int) -> bytes:
        body = {
            "prompt": asked.prompt,
            "width": asked.side,
            "height": asked.side,
            "steps": asked.steps,
            "cfg_scale": asked.guidance_scale,
            "sampler_name": "Euler",
            "scheduler": "Normal",
            "seed": seed,
        }
        answer = json.loads(connection.ask("POST", "/sdapi/v1/txt2img", body))
        return base64.b64decode(answer["images"][0])

    return call


def comfyui(connection: Connection, messages: Any, asked: Asked) -> Caller:
    """Return the caller of ComfyUI's routes, which follows its prompt on a websocket.

    Args:
        connection: To the server.
        messages: A websocket opened by `comfyui_messages_url`.
        asked: The picture.
    """

    def call(seed: int) -> bytes:
        body = {"prompt": _workflow(asked, seed), "client_id": _CLIENT}
        prompt = json.loads(connection.ask("POST", "/prompt", body))["prompt_id"]
        image = _image(messages, prompt)
        return connection.ask("GET", f"/view?{urlencode(image)}")

    return call


def comfyui_messages_url(url: str) -> str:
    """Return where the websocket of `comfyui` is opened."""
    return f"ws://{urlsplit(url).netloc}/ws?clientId={quote(_CLIENT)}"


def _image(messages: Any, prompt: str) -> Mapping[str, str]:
    """Wait for a prompt's end, as ComfyUI's own example does, and return how `/view` finds it."""
    image: Mapping[str, str] = {}
    while True:
        message = messages.recv(timeout=_TIMEOUT_S)
        told = {} if isinstance(message, bytes) else json.loads(message)
        data = told.get("data", {})
        if data.get("prompt_id") != prompt:
            continue
        if told["type"] == "executed":
            image = data["output"]["images"][0]
        if told["type"] == "execution_error":
            raise DoorFailed("ComfyUI's door failed.", value=data)
        if told["type"] == "executing" and data["node"] is None:
            return image


def _workflow(asked: Asked, seed: int) -> dict[str, Any]:
    def node(class_type: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": class_type, "inputs": inputs}

    sampled = node(
        "KSampler",
        model=["1", 0],
        positive=["2", 0],
        negative=["3", 0],
        latent_image=["4", 0],
        seed=seed,
        steps=asked.steps,
        cfg=asked.guidance_scale,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=f"{asked.model}.safetensors"),
        "2": node("CLIPTextEncode", text=asked.prompt, clip=["1", 1]),
        "3": node("CLIPTextEncode", text="", clip=["1", 1]),
        "4": node("EmptySD3LatentImage", width=asked.side, height=asked.side, batch_size=1),
        "5": sampled,
        "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
        "7": node("SaveImage", images=["6", 0], filename_prefix="doors"),
    }
