"""The routes that AUTOMATIC1111's and Forge's clients call, under `/sdapi/v1`.

Kelvin keeps no options between requests: what a client would set with `/options` it gives with each
request, in `override_settings`. Setting what already is so is no error, because clients do.
"""

# No `from __future__ import annotations` here: FastAPI reads the annotations of local functions.
import asyncio
import base64
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from serve.errors import JobConflict, JobNotFound, NotSupportedYet
from serve.http.a1111_infotext import info, infotext
from serve.http.a1111_names import SAMPLERS, SCHEDULERS
from serve.http.a1111_request import Asked, read_img2img, read_txt2img
from serve.http.body import read_json, repeatable
from serve.http.gate import tenant_of
from serve.job_ids import accepted_seconds_ago
from serve.png_text import with_png_text
from serve.requests import GenerateResult, ImageRef, JobRecord

if TYPE_CHECKING:
    from serve.pipeline import Pipeline

_MODEL_OPTION = "sd_model_checkpoint"


def web_ui_routes(pipeline: "Pipeline") -> APIRouter:
    """Return the routes of this door."""
    router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
    largest_body = pipeline.settings.pipeline.max_body_bytes

    async def body_of(request: Request) -> Any:
        body = await read_json(request, largest_body)
        if not isinstance(body, dict):
            return body
        # What is said again in `parameters`; the start image, which is long, is not.
        images = {name: body.pop(name) for name in ("init_images",) if name in body}
        return {**repeatable(body), **images}

    async def made(request: Request, body: dict[str, Any], asked: Asked) -> dict[str, Any]:
        result = await pipeline.generate(asked.request, tenant_of(request))
        return await _answer(pipeline, body, asked, result)

    @router.post("/txt2img")
    async def txt2img(request: Request) -> dict[str, Any]:
        """Make pictures and wait for them; hanging up cancels the job."""
        body = await body_of(request)
        return await made(request, body, read_txt2img(body))

    @router.post("/img2img")
    async def img2img(request: Request) -> dict[str, Any]:
        """Make pictures from a start image; otherwise as txt2img."""
        body = await body_of(request)
        return await made(request, body, read_img2img(body))

    @router.get("/progress")
    async def progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
        """Say how far the caller's oldest job under way is, with its newest preview."""
        jobs = await pipeline.under_way(tenant_of(request))
        return _progress(jobs, skip_current_image)

    @router.post("/interrupt")
    async def interrupt(request: Request) -> dict[str, Any]:
        """Cancel the caller's jobs that are under way."""
        tenant = tenant_of(request)
        for job in await pipeline.under_way(tenant):
            try:
                await pipeline.cancel(job.id, tenant)
            except (JobConflict, JobNotFound):
                continue  # it ended, or was deleted, meanwhile
        return {}

    @router.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        """Return the samplers."""
        return [
            {"name": label, "aliases": [*aliases, name], "options": {}}
            for name, (label, aliases) in SAMPLERS.items()
        ]

    @router.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        """Return the schedulers; `automatic` is the model's own."""
        labels: list[tuple[str, str]] = [("automatic", "Automatic"), *SCHEDULERS.items()]
        shared = {"aliases": None, "default_rho": -1.0, "need_inner_model": False}
        return [{"name": name, "label": label, **shared} for name, label in labels]

    @router.get("/sd-models")
    async def models() -> list[dict[str, Any]]:
        """Return the models that take requests."""
        return [
            {
                "title": model["name"],
                "model_name": model["name"],
                "hash": None,
                "sha256": None,
                "filename": model["name"],
                "config": None,
            }
            for model in await pipeline.models()
            if model["state"] == "loaded"
        ]

    @router.get("/loras")
    async def loras() -> list[dict[str, Any]]:
        """Return the LoRAs that a prompt may name."""
        return [
            {"name": name, "alias": name, "path": name, "metadata": {}}
            for name in (await pipeline.loras())["available"]
        ]

    @router.get("/options")
    async def options() -> dict[str, Any]:
        """Return what holds for requests that override nothing."""
        return _options(pipeline)

    @router.post("/options")
    async def set_options(request: Request) -> None:
        """Take what is so already and refuse the rest."""
        is_so = _options(pipeline)
        wanted = await read_json(request, largest_body)
        for name, value in wanted.items() if isinstance(wanted, dict) else ():
            if name not in is_so or is_so[name] != value:
                raise NotSupportedYet(
                    f"Option {name!r} cannot be set for requests to come.",
                    field=name,
                    value=value,
                    allowed="override_settings of each request, or Kelvin's own settings",
                )

    @router.get("/scripts")
    async def scripts() -> dict[str, list[str]]:
        """Return the scripts: none."""
        return {"txt2img": [], "img2img": []}

    @router.get("/cmd-flags")
    async def flags() -> dict[str, Any]:
        """Return the web UI's command line: none."""
        return {}

    return router


def _options(pipeline: "Pipeline") -> dict[str, Any]:
    return {
        _MODEL_OPTION: pipeline.spec.name,
        "sd_checkpoint_hash": None,
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "samples_format": "png",
    }


async def _answer(
    pipeline: "Pipeline", body: dict[str, Any], asked: Asked, result: GenerateResult
) -> dict[str, Any]:
    async def file(image: ImageRef) -> str:
        data = await pipeline.picture(image)
        if image.output_format == "png":
            data = with_png_text(data, {"parameters": infotext(result, image)})
        return base64.b64encode(data).decode("ascii")

    wanted = result.images if asked.send_images else ()
    return {
        "images": list(await asyncio.gather(*(file(image) for image in wanted))),
        "parameters": {name: value for name, value in body.items() if name != "init_images"},
        "info": info(result, asked.batch_size, asked.warnings),
    }


def _progress(jobs: list[JobRecord], skip_current_image: bool) -> dict[str, Any]:
    """Return what the web UI's `/progress` answers."""
    event = jobs[0].progress if jobs else None
    request = jobs[0].request if jobs else None
    step, steps = (event.step or 0, event.steps or 0) if event else (0, 0)
    pictures = request.num_images if request else 1
    done = ((event.image or 0) * steps + step) / (steps * pictures) if event and steps else 0.0
    preview = event.preview if event and not skip_current_image else None
    return {
        # The web UI's clients take exactly 0 for idle.
        "progress": min(max(done, 0.01), 0.99) if jobs else 0.0,
        "eta_relative": accepted_seconds_ago(jobs[0].id) * (1 / done - 1) if done else 0.0,
        "state": {
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
            "job": jobs[0].id if jobs else "",
            "job_count": len(jobs),
            "job_timestamp": jobs[0].id if jobs else "0",
            "job_no": 0,
            "sampling_step": step,
            "sampling_steps": steps,
        },
        "current_image": preview,
        "textinfo": None,
    }
