"""ComfyUI's HTTP routes and websocket, each under `/api` as well (`server.py`)."""

# No `from __future__ import annotations` here: FastAPI reads the annotations of local functions.
import asyncio
import importlib.metadata
import os
import platform
import sys
import uuid
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, FastAPI, Request, WebSocket
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import FormData, UploadFile

from serve.errors import InvalidRequest, KelvinError
from serve.http.body import read_json, repeatable
from serve.http.comfyui_door import ComfyuiDoor
from serve.http.comfyui_nodes import NODES, TEXT_ENCODERS, VAES, shown_node
from serve.http.comfyui_sockets import Socket
from serve.http.errors import RouteNotFound
from serve.http.form import read_form
from serve.http.gate import tenant_of
from serve.init_image import shown_small

if TYPE_CHECKING:
    from serve.pipeline import Pipeline

_API_VERSION = "0.3.0"  # of ComfyUI, whose routes these are
_TRY_AGAIN_LATER = 1013  # RFC 6455's registry of close codes
_MOST_LISTED = 200
_LONGEST_CLIENT = 200  # characters of an id
_LARGEST_PROMPT = 4 << 20  # bytes; pictures are uploaded, not sent in it
_NEWEST_LISTED = 64
_LONGEST_PREVIEW_SIDE = 2048  # pixels
_PREVIEWS_AT_ONCE = 2  # each decodes a picture: 120 MB at most, and as much again for the copy


def add_comfyui(app: FastAPI, pipeline: "Pipeline") -> None:
    """Add the routes to an app.

    Args:
        app: Behind its gate.
        pipeline: That makes the pictures.
    """
    router = _router(ComfyuiDoor(pipeline), pipeline)
    app.include_router(router)
    app.include_router(router, prefix="/api")


def _router(door: ComfyuiDoor, pipeline: "Pipeline") -> APIRouter:
    router = APIRouter(include_in_schema=False)  # ComfyUI's contract, not ours
    largest_body = pipeline.settings.pipeline.max_body_bytes
    previews = asyncio.Semaphore(_PREVIEWS_AT_ONCE)

    async def body_of(request: Request, if_empty: Any = None) -> dict[str, Any]:
        most = min(largest_body, _LARGEST_PROMPT)
        body = await read_json(request, most, any_content_type=True, if_empty=if_empty)
        if not isinstance(body, dict):
            raise InvalidRequest(
                "The body is no JSON object.", field="body", allowed="a JSON object in UTF-8"
            )
        plain: dict[str, Any] = repeatable(body)
        return plain

    @router.post("/prompt")
    async def post_prompt(request: Request) -> JSONResponse:
        """Take a workflow in API format, once its jobs are written to the store."""
        record = await door.accept(await body_of(request), tenant_of(request))
        answer = {
            "prompt_id": record.id,
            "number": record.number,
            "node_errors": record.node_errors,
            "warnings": record.warnings,
        }
        return JSONResponse(answer)

    @router.get("/prompt")
    async def get_prompt(request: Request) -> JSONResponse:
        """Say how many prompts are not over."""
        return JSONResponse(await door.remaining(tenant_of(request)))

    @router.get("/history")
    async def history(request: Request, max_items: str = "", offset: str = "") -> JSONResponse:
        """List prompts that are over, oldest first: the newest ones, or those before `offset`."""
        most = _count("max_items", max_items, _NEWEST_LISTED)
        skip = _count("offset", "" if offset == "-1" else offset, 0)
        records = await door.records.newest(tenant_of(request), min(most, _MOST_LISTED), skip)
        entries = await asyncio.gather(*map(door.history, records))
        found = zip(records, entries, strict=True)
        return JSONResponse({record.id: entry for record, entry in found if entry is not None})

    @router.get("/history/{prompt_id}")
    async def history_of(request: Request, prompt_id: str) -> JSONResponse:
        """Say what became of a prompt; an empty object until it is over."""
        entry = await door.history_of(prompt_id, tenant_of(request))
        return JSONResponse({} if entry is None else {prompt_id: entry})

    @router.post("/history", response_class=Response)
    async def post_history(request: Request) -> Response:
        """Remove prompts from history: `{"clear": true}` or `{"delete": [ids]}`."""
        body, tenant = await body_of(request), tenant_of(request)
        for record in await _named(door, body, tenant):
            await door.forget(record)
        if body.get("clear") is True:
            await door.clear(tenant)
        return Response()

    @router.get("/queue")
    async def queue(request: Request) -> JSONResponse:
        """List prompts that are not over."""
        return JSONResponse(await door.queue(tenant_of(request)))

    @router.post("/queue", response_class=Response)
    async def post_queue(request: Request) -> Response:
        """Cancel prompts: `{"clear": true}` those that wait, `{"delete": [ids]}` the named ones."""
        body, tenant = await body_of(request), tenant_of(request)
        for record in await _named(door, body, tenant):
            await door.cancel(record)
        if body.get("clear") is True:
            await door.cancel_all(tenant, waiting=True)
        return Response()

    @router.post("/interrupt", response_class=Response)
    async def interrupt(request: Request) -> Response:
        """Cancel what is being made: of `prompt_id`, or of all one's own prompts."""
        # Older clients send no body.
        body, tenant = await body_of(request, if_empty={}), tenant_of(request)
        if body.get("prompt_id") is None:
            await door.cancel_all(tenant, waiting=False)
        else:
            for record in await _named(door, {"delete": [body["prompt_id"]]}, tenant):
                await door.cancel(record)
        return Response()

    @router.post("/free", response_class=Response)
    async def free() -> Response:
        """Do nothing: models stay loaded, `kelvin models unload` unloads them."""
        return Response()

    @router.post("/upload/image")
    async def upload_image(request: Request) -> JSONResponse:
        """Keep a picture for LoadImage: a form with image, subfolder, overwrite."""
        tenant = tenant_of(request)
        form = await read_form(request, largest_body)
        try:
            file = form.get("image")
            if not isinstance(file, UploadFile):
                raise InvalidRequest(
                    "The form has no picture.", field="image", allowed="a file in field image"
                )
            subfolder = _text_in(form, "subfolder").strip("/")
            overwrite = _text_in(form, "overwrite").lower() in ("true", "1")
            name = await door.inputs.keep(
                file.filename or "image.png",
                subfolder,
                await file.read(),
                tenant,
                overwrite=overwrite,
            )
        finally:
            await form.close()
        return JSONResponse({"name": name, "subfolder": subfolder, "type": "input"})

    @router.get("/view", response_class=Response)
    async def view(
        request: Request,
        filename: str = "",
        subfolder: str = "",
        type: str = "output",
        preview: str | None = None,
    ) -> Response:
        """Return a picture by the name that `/history` gave it; `preview=webp;90` shrinks it."""
        tenant = tenant_of(request)
        if type == "input":
            path = f"{subfolder}/{filename}" if subfolder else filename
            data, kind = await door.input_picture(path, tenant)
        else:
            data, kind = await door.output_picture(filename, tenant)
        if preview is not None:
            async with previews:
                data, kind = await asyncio.to_thread(_as_preview, data, preview)
        name = quote(filename.rpartition("/")[2], safe="() .")
        headers = {
            "Content-Disposition": f"inline; filename*=UTF-8''{name}",
            "X-Content-Type-Options": "nosniff",
        }
        return Response(data, media_type=kind, headers=headers)

    @router.get("/object_info")
    async def object_info(request: Request) -> JSONResponse:
        """List the nodes that workflows may have."""
        catalogue = await door.catalogue(tenant_of(request))
        return JSONResponse({name: shown_node(node, catalogue) for name, node in NODES.items()})

    @router.get("/object_info/{node_class}")
    async def object_info_of(request: Request, node_class: str) -> JSONResponse:
        """Describe one class of nodes; an empty object where there is none."""
        node = NODES.get(node_class)
        shown = (
            {}
            if node is None
            else {node_class: shown_node(node, await door.catalogue(tenant_of(request)))}
        )
        return JSONResponse(shown)

    @router.get("/models")
    async def model_folders(request: Request) -> JSONResponse:
        """List the folders that `/models/{folder}` knows."""
        return JSONResponse(list(_folders(await door.catalogue(tenant_of(request)))))

    @router.get("/models/{folder}")
    async def models_in(request: Request, folder: str) -> JSONResponse:
        """List the files of a folder, as workflows name them."""
        folders = _folders(await door.catalogue(tenant_of(request)))
        if folder not in folders:
            raise RouteNotFound(
                "There is no such folder.", field="folder", value=folder, allowed="one of /models"
            )
        return JSONResponse(folders[folder])

    @router.get("/embeddings")
    async def embeddings() -> JSONResponse:
        """List textual inversions: there are none."""
        return JSONResponse([])

    @router.get("/extensions")
    async def extensions() -> JSONResponse:
        """List extensions of ComfyUI's page: there are none."""
        return JSONResponse([])

    @router.get("/features")
    async def features() -> JSONResponse:
        """Say what clients may use beyond the first version of the interface."""
        return JSONResponse({"supports_preview_metadata": False, "max_upload_size": largest_body})

    @router.get("/system_stats")
    async def system_stats() -> JSONResponse:
        """Say what this is. Machines are the operator's business: `/v1/status` tells of them."""
        kelvin = importlib.metadata.version("kelvin-serve")
        device = {"name": f"Kelvin {kelvin}: {pipeline.spec.name}", "type": "kelvin", "index": 0}
        memory = dict.fromkeys(
            ("vram_total", "vram_free", "torch_vram_total", "torch_vram_free"), 0
        )
        system = {
            "os": os.name,
            "ram_total": 0,
            "ram_free": 0,
            "comfyui_version": f"{_API_VERSION}+kelvin.{kelvin}",
            "python_version": f"{platform.python_version()} ({sys.platform})",
            "pytorch_version": "",
            "embedded_python": False,
            "argv": [],
        }
        return JSONResponse({"system": system, "devices": [{**device, **memory}]})

    @router.websocket("/ws")
    async def websocket(websocket: WebSocket) -> None:
        """Send what happens to the prompts of `clientId`."""
        tenant = tenant_of(websocket)
        client = websocket.query_params.get("clientId") or uuid.uuid4().hex
        if len(client) > _LONGEST_CLIENT:
            raise InvalidRequest(
                "The client's id is too long.",
                field="clientId",
                value=client,
                allowed=f"at most {_LONGEST_CLIENT} characters; one is drawn if absent",
            )
        await websocket.accept()
        socket = Socket()
        door.sockets.add(tenant, client, socket)
        try:
            try:
                await door.meet(tenant, client, socket)
            except KelvinError as error:
                await websocket.close(_TRY_AGAIN_LATER, error.code)
                return
            watching = asyncio.create_task(door.watch(tenant, client, socket))
            try:
                await socket.serve(websocket)
            finally:
                watching.cancel()
        finally:
            door.sockets.remove(tenant, client, socket)

    return router


def _text_in(form: FormData, name: str) -> str:
    value = form.get(name, "")
    if isinstance(value, UploadFile):
        raise InvalidRequest(
            f"Field {name!r} is a file.", field=name, value=value.filename, allowed="text"
        )
    return value


async def _named(door: ComfyuiDoor, body: dict[str, Any], tenant: str) -> list[Any]:
    ids = body.get("delete", [])
    if not isinstance(ids, list) or len(ids) > _MOST_LISTED:
        raise InvalidRequest(
            "Field 'delete' is no list of prompt ids.",
            field="delete",
            value=ids,
            allowed=f"a list of at most {_MOST_LISTED}",
        )
    found = [await door.records.find(str(each), tenant) for each in ids]
    return [record for record in found if record is not None]


def _folders(catalogue: Any) -> dict[str, list[str]]:
    checkpoints = list(catalogue.checkpoints)
    return {
        "checkpoints": checkpoints,
        "diffusion_models": checkpoints,
        "unet": checkpoints,
        "loras": list(catalogue.loras),
        "text_encoders": list(TEXT_ENCODERS),
        "clip": list(TEXT_ENCODERS),
        "vae": list(VAES),
    }


def _count(name: str, text: str, default: int) -> int:
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise InvalidRequest(
            f"Query parameter {name!r} is no number.",
            field=name,
            value=text,
            allowed="a whole number, 0 or more",
        )
    return int(text)


def _as_preview(data: bytes, preview: str) -> tuple[bytes, str]:
    """Return a picture as `preview` asks: webp or jpeg, a semicolon, and the quality."""
    asked, _, quality = preview.partition(";")
    kind: Literal["webp", "jpeg"] = "jpeg" if asked == "jpeg" else "webp"
    level = int(quality) if quality.isascii() and quality.isdigit() and len(quality) < 4 else 90
    small = shown_small(data, kind, min(100, max(1, level)), _LONGEST_PREVIEW_SIDE)
    return small, f"image/{kind}"
