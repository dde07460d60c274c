"""OpenAI's Images API: `/v1/images/generations`, and `/v1/images/edits` by image-to-image.

Its clients work unchanged. `user`, `quality` and the like are taken and mean nothing here;
`output_compression` is the quality of jpeg and webp; every field of Kelvin's own contract may be
given beside them (`extra_body` of the official client). The answer's `x-kelvin-job-id` is its job.
"""

# No `from __future__ import annotations` here: FastAPI reads the annotations of local functions.
import base64
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from serve.client_errors import error_from_body
from serve.endings import outcome
from serve.errors import JobCancelled, KelvinError
from serve.http.body import read_json
from serve.http.error_shapes import error_body
from serve.http.errors import error_response
from serve.http.form import read_form
from serve.http.gate import key_counts, tenant_of
from serve.http.idempotency_header import with_idempotency_key
from serve.http.openai_requests import Asked, asked_of, body_schema, edit_of, edit_schema
from serve.http.server_sent_events import message, stream_response
from serve.models import model_not_found
from serve.requests import GenerateResult, ImageRef, JobEvent

if TYPE_CHECKING:
    from serve.pipeline import Pipeline

Kind = Literal["image_generation", "image_edit"]

_TAGS: list[str | Enum] = ["OpenAI"]
_TOKEN_PIXELS = 16  # a side of what the transformer takes for one token
_JSON: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": body_schema()}}}
}
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": {"schema": edit_schema()}},
    }
}


def add_openai_routes(app: FastAPI, pipeline: "Pipeline", largest_body: int) -> None:
    """Add the door's routes.

    Args:
        app: Behind the gate.
        pipeline: Makes the pictures.
        largest_body: Bytes.
    """

    @app.post("/v1/images/generations", tags=_TAGS, openapi_extra=_JSON)
    async def generations(request: Request) -> Response:
        """Make pictures as OpenAI's API does; with `stream`, previews of the denoising first."""
        body = await read_json(request, largest_body)
        return await answer(
            request, asked_of(with_idempotency_key(request, body)), "image_generation"
        )

    @app.post("/v1/images/edits", tags=_TAGS, openapi_extra=_FORM)
    async def edits(request: Request) -> Response:
        """Make pictures that start from `image`, which `strength` says how far to leave."""
        form = await read_form(request, largest_body)
        try:
            body = await edit_of(form)
        finally:
            await form.close()
        return await answer(request, asked_of(with_idempotency_key(request, body)), "image_edit")

    @app.get("/v1/models/{name:path}", tags=_TAGS)
    async def model(name: str) -> dict[str, Any]:
        """Return one model as OpenAI's clients read it, with what `/v1/models` says of it."""
        found = {each["name"]: each for each in await pipeline.models()}
        if name not in found:
            raise model_not_found(name, found)
        return {**found[name], **openai_model(found[name])}

    async def answer(request: Request, asked: Asked, kind: Kind) -> Response:
        events = pipeline.stream(asked.request, tenant_of(request))
        headers = {"x-kelvin-job-id": (await anext(events)).id}
        if asked.stream:
            response: Response = stream_response(
                told(request, asked, kind, events), key_counts(request)
            )
        else:
            try:
                async with aclosing(events):
                    result = await outcome(events)
                response = JSONResponse(
                    {
                        "created": int(time.time()),
                        "data": [await shown(image, asked) for image in result.images],
                        "background": "opaque",
                        "output_format": result.request.output_format,
                        "size": _size(result),
                        "usage": _usage(result, result.images),
                        "warnings": result.warnings,
                    }
                )
            except KelvinError as error:
                response = error_response(error, request.scope)
        response.headers.update(headers)
        return response

    async def shown(image: ImageRef, asked: Asked) -> dict[str, Any]:
        if asked.as_url:
            return {"url": image.url, "seed": image.seed}
        data = await pipeline.picture(image)
        return {"b64_json": base64.b64encode(data).decode("ascii"), "seed": image.seed}

    async def told(
        request: Request, asked: Asked, kind: Kind, events: AsyncGenerator[JobEvent, None]
    ) -> AsyncIterator[str]:
        partial = 0
        try:
            async with aclosing(events):
                async for event in events:
                    if _is_due(event, partial, asked.partial_images):
                        yield _message(f"{kind}.partial_image", _partial(event, asked, partial))
                        partial += 1
                    if event.event == "cancelled":
                        raise JobCancelled("The job was cancelled.", field="id", value=event.id)
                    if event.event == "failed":
                        raise error_from_body(event.error)
                    if event.result is not None:
                        for image in event.result.images:
                            body = {
                                **await shown(image, asked),
                                "created_at": int(time.time()),
                                "size": _size(event.result),
                                "quality": "auto",
                                "background": "opaque",
                                "output_format": image.output_format,
                                "usage": _usage(event.result, [image]),
                            }
                            yield _message(f"{kind}.completed", body)
        except KelvinError as error:
            yield message("error", json.dumps(error_body(error, request.scope)))


def openai_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return one of `Pipeline.models` as OpenAI's API lists it; nobody knows when it was made."""
    return {"id": model["name"], "object": "model", "created": 0, "owned_by": "kelvin"}


def _is_due(event: JobEvent, sent: int, partial_images: int) -> bool:
    """Whether an event's preview is the next partial image: they are spread over the steps."""
    if event.preview is None or event.image != 0 or sent >= partial_images:
        return False
    return (event.step or 0) * (partial_images + 1) >= (sent + 1) * (event.steps or 1)


def _partial(event: JobEvent, asked: Asked, index: int) -> dict[str, Any]:
    return {
        "b64_json": event.preview,
        "partial_image_index": index,
        "created_at": int(time.time()),
        "size": asked.size,
        "quality": "auto",
        "background": "opaque",
        "output_format": "jpeg",  # a preview's, one pixel for 8 x 8 of the picture
    }


def _message(kind: str, body: Mapping[str, Any]) -> str:
    return message(kind, json.dumps({"type": kind, **body}))


def _size(result: GenerateResult) -> str:
    return f"{result.request.width}x{result.request.height}"


def _usage(result: GenerateResult, images: Sequence[ImageRef]) -> dict[str, Any]:
    """Return the tokens of the prompt and of the start image, and those that were drawn."""
    request = result.request
    text = sum(report.tokens or 0 for report in result.stages)
    start = 0 if request.init_image is None else _tokens(request.width, request.height)
    drawn = sum(_tokens(image.width, image.height) for image in images)
    return {
        "input_tokens": text + start,
        "input_tokens_details": {"image_tokens": start, "text_tokens": text},
        "output_tokens": drawn,
        "total_tokens": text + start + drawn,
    }


def _tokens(width: int | None, height: int | None) -> int:
    return ((width or 0) // _TOKEN_PIXELS) * ((height or 0) // _TOKEN_PIXELS)
