"""Callers with ComfyUI's tools: a workflow is queued, a websocket tells of its end."""

from __future__ import annotations

import json
import re
import uuid
from typing import Any
from urllib.parse import quote, urlencode

import gevent
import websocket
from gevent.event import Event

from loadtest.users.exchange import Refused
from loadtest.users.open_loop_user import Drawn, OpenLoopUser

_WAIT_S = 300.0
_LOOK_S = 5.0  # at /history, in case the websocket missed the end
_PAUSE_S = 0.5
_ENDS = ("execution_success", "execution_error", "execution_interrupted")
# Of the file names that the door gives: PREFIX_JOB_00001_.png
_JOB = re.compile(r"^load_(.+)_\d{5}_\.")


class ComfyUIUser(OpenLoopUser):
    """Queues workflows under one client id, as one front end does."""

    door = "comfyui"
    endpoint = "POST /prompt"

    def on_start(self) -> None:
        """Open the websocket before the first request is due."""
        self._client_id = uuid.uuid4().hex
        self._ended: dict[str, Event] = {}
        self._listener = gevent.spawn(self._listen)

    def on_stop(self) -> None:
        """Stop listening."""
        self._listener.kill()

    def draw(self, request: dict[str, Any]) -> Drawn:
        """Queue one workflow, wait for its end and view its picture."""
        prompt_id = uuid.uuid4().hex
        ended = self._ended[prompt_id] = Event()
        try:
            body = {
                "prompt": workflow(request),
                "client_id": self._client_id,
                "prompt_id": prompt_id,
            }
            self.exchange.ask("POST", "/prompt", body)
            image = self._image(prompt_id, ended)
        finally:
            del self._ended[prompt_id]
        picture = self.exchange.ask("GET", f"/view?{urlencode(image)}").body
        job = _JOB.match(image["filename"])
        return Drawn(picture, job[1] if job else None)

    def _image(self, prompt_id: str, ended: Event) -> dict[str, str]:
        deadline = self.run_of_plan.now + _WAIT_S
        while self.run_of_plan.now < deadline:
            ended.wait(_LOOK_S)
            entry = self.exchange.ask("GET", f"/history/{prompt_id}").json().get(prompt_id)
            if entry is None:
                ended.clear()
                continue
            for output in entry["outputs"].values():
                image: dict[str, str] = output["images"][0]
                return image
            raise Refused(_error_in(entry))
        raise Refused("no_end_within_300_s")

    def _listen(self) -> None:
        scheme, _, rest = self.environment.host.rstrip("/").partition("://")
        url = f"{scheme.replace('http', 'ws')}://{rest}/ws?clientId={quote(self._client_id)}"
        while True:
            try:
                socket = websocket.create_connection(url, header=self.exchange.authorization)
                while True:
                    message = socket.recv()
                    if not message:
                        break
                    if isinstance(message, str):
                        self._hear(json.loads(message))
            except (OSError, websocket.WebSocketException):
                pass
            # Who asks meanwhile learns from /history.
            gevent.sleep(_PAUSE_S)

    def _hear(self, message: dict[str, Any]) -> None:
        if message.get("type") in _ENDS:
            ended = self._ended.get(message["data"].get("prompt_id"))
            if ended is not None:
                ended.set()


def workflow(request: dict[str, Any]) -> dict[str, Any]:
    """Return ComfyUI's own text-to-image workflow, in API format, for a request's fields."""
    return {
        "checkpoint": {
            "class_type": "CheckpointLoaderSimple",
            "inputs": {"ckpt_name": f"{request['model']}.safetensors"},
        },
        "positive": {
            "class_type": "CLIPTextEncode",
            "inputs": {"text": request["prompt"], "clip": ["checkpoint", 1]},
        },
        "negative": {
            "class_type": "CLIPTextEncode",
            "inputs": {"text": request.get("negative_prompt", ""), "clip": ["checkpoint", 1]},
        },
        "latent": {
            "class_type": "EmptySD3LatentImage",
            "inputs": {"width": request["width"], "height": request["height"], "batch_size": 1},
        },
        "sampler": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["checkpoint", 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["latent", 0],
                "seed": request["seed"],
                "steps": request["num_inference_steps"],
                "cfg": request["guidance_scale"],
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "decode": {
            "class_type": "VAEDecode",
            "inputs": {"samples": ["sampler", 0], "vae": ["checkpoint", 2]},
        },
        "save": {
            "class_type": "SaveImage",
            "inputs": {"images": ["decode", 0], "filename_prefix": "load"},
        },
    }


def _error_in(entry: dict[str, Any]) -> str:
    for _, data in entry.get("status", {}).get("messages", []):
        if "exception_type" in data:
            return str(data["exception_type"])
    return "no_picture"
