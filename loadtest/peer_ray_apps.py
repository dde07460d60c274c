"""Peers of Kelvin on Ray Serve: diffusers' pipeline in the form of Ray's own tutorial, and batched.

The tutorial is "Serve a Stable Diffusion Model": an ingress that awaits the handle of a deployment
which calls the pipeline, and answers with a PNG.
"""

import asyncio
import io
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from fastapi import FastAPI, Response
from PIL import Image
from ray import serve

from loadtest.peer_dtype import stored_dtype
from loadtest.peer_pipelines import call, compiled
from loadtest.peer_settings import PictureAsked

MOST_TOGETHER = 2
"""Of serve.batch on a CPU, where a row among many costs what it costs alone."""
_WAIT_S = 0.05  # for others, of serve.batch

app = FastAPI()


def loaded(model: str, threads: int, device: str = "cpu") -> StableDiffusion3Pipeline:
    """Load a pipeline as its documentation says: on a card in bfloat16, else as it is stored.

    Args:
        model: Folder in Diffusers layout, without FP8.
        threads: Of torch, in this process.
        device: Where it is to run.
    """
    torch.set_num_threads(threads)
    dtype = stored_dtype(Path(model)) if device == "cpu" else torch.bfloat16
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        model, torch_dtype=dtype, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def as_png(pictures: list[Any]) -> list[bytes]:
    """Return pictures as files."""
    files = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        files.append(file.getvalue())
    return files


class StableDiffusion:
    """Deployment of the tutorial: one call of the pipeline for each request."""

    def __init__(self, model: str, threads: int, device: str) -> None:
        self._pipeline = loaded(model, threads, device)

    def generate(self, asked: PictureAsked) -> bytes:
        """Make one picture; a PNG."""
        return as_png(call(self._pipeline, [asked]))[0]


class BatchedStableDiffusion:
    """The same compiled, with `serve.batch`."""

    def __init__(self, model: str, threads: int) -> None:
        pipeline = loaded(model, threads)
        # The decoder would take minutes to compile on a CPU.
        self._pipeline = compiled(pipeline, decoder=False)
        for count in range(1, MOST_TOGETHER + 1):
            call(
                self._pipeline, [PictureAsked("warm up", 0, 256, 2, max_sequence_length=48)] * count
            )

    @serve.batch(max_batch_size=MOST_TOGETHER, batch_wait_timeout_s=_WAIT_S)
    async def generate(self, asked: list[PictureAsked]) -> list[bytes]:
        """Make what was gathered; a call of the pipeline has one number of steps."""
        made: dict[int, bytes] = {}
        for steps in dict.fromkeys(each.steps for each in asked):
            same = [at for at, each in enumerate(asked) if each.steps == steps]
            pictures = await asyncio.to_thread(call, self._pipeline, [asked[at] for at in same])
            made |= dict(zip(same, as_png(pictures), strict=True))
        return [made[at] for at in range(len(asked))]


@serve.ingress(app)
class Imagine:
    """Ingress of the tutorial."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    @app.get("/imagine")
    async def generate(
        self,
        prompt: str,
        steps: int,
        seed: int,
        scale: float,
        side: int = 256,
        max_sequence_length: int = 48,
    ) -> Response:
        """Answer with a PNG."""
        asked = PictureAsked(prompt, seed, side, steps, scale, max_sequence_length)
        return Response(await self._handle.generate.remote(asked), media_type="image/png")


def application(name: str, model: str, threads: int) -> serve.Application:
    """Return the application of `tutorial` or `batched`, on a CPU.

    Args:
        name: Which.
        model: As of `loaded`.
        threads: Of torch.
    """
    if name == "tutorial":
        return tutorial(model, threads, "cpu", 1)
    return serve.deployment(Imagine).bind(
        serve.deployment(BatchedStableDiffusion).bind(model, threads)
    )


def tutorial(model: str, threads: int, device: str, replicas: int) -> serve.Application:
    """Return the tutorial's application.

    Args:
        model: As of `loaded`.
        threads: Of torch, in each replica.
        device: `cuda` gives each replica a card of its own.
        replicas: Of the pipeline.
    """
    # The tutorial leaves max_ongoing_requests at 5. Its method is a plain function, which Serve
    # runs in threads, and the pipeline's scheduler holds the state of one call: two calls at once
    # end in 500.
    deployment = serve.deployment(
        max_ongoing_requests=1,
        num_replicas=replicas,
        ray_actor_options={"num_gpus": int(device == "cuda")},
    )(StableDiffusion)
    return serve.deployment(Imagine).bind(deployment.bind(model, threads, device))
