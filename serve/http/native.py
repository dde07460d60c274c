"""Kelvin's own HTTP routes: plain functions around one Pipeline."""

# No `from __future__ import annotations` here: FastAPI reads the annotations of local functions.
import importlib.metadata
from typing import TYPE_CHECKING, Any, get_args

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from serve.errors import InvalidRequest
from serve.http.body import read_bytes, read_json
from serve.http.document import DocumentedApp
from serve.http.doors import add_doors
from serve.http.early_refusal import StandsInLine
from serve.http.errors import install_error_handlers
from serve.http.gate import Gate, is_known, key_counts, tenant_of
from serve.http.head import HeadAsGet
from serve.http.idempotency_header import with_idempotency_key
from serve.http.openai import openai_model
from serve.http.room import CallRoom
from serve.http.server_sent_events import event_response
from serve.http.stored_picture import stored_picture, stored_thumbnail
from serve.http.traced import Traced
from serve.key_ring import KeyRing
from serve.key_store import key_store
from serve.pictures import CONTENT_TYPES
from serve.requests import (
    EventName,
    GenerateRequest,
    GenerateResult,
    JobPage,
    JobRecord,
    Upload,
)

if TYPE_CHECKING:
    from serve.pipeline import Pipeline


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return a model's schema as it stands in the OpenAPI document, beside its other schemas."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return schema


_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _schema(GenerateRequest)}},
    }
}
_PICTURE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in CONTENT_TYPES.values()
        },
    }
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "JobEvent objects, one an event, until the job has ended",
        "content": {
            "text/event-stream": {
                # Of each event, as OpenAPI 3.2 says of streams.
                "schema": {
                    "type": "object",
                    "properties": {
                        "event": {"type": "string", "enum": list(get_args(EventName))},
                        "data": {
                            "type": "string",
                            "contentMediaType": "application/json",
                            "contentSchema": {"$ref": "#/components/schemas/JobEvent"},
                        },
                    },
                    "required": ["event", "data"],
                }
            }
        },
    }
}


class ErrorDetail(BaseModel):
    """What went wrong, where, and what would have been right."""

    type: str
    code: str
    message: str
    field: str | None
    value: Any
    allowed: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class ReadyCheck(BaseModel):
    """One part of what a job needs."""

    name: str
    ok: bool
    detail: str


class Ready(BaseModel):
    """Whether a job sent now would be taken; the checks for who has shown a key or needs none."""

    ready: bool
    checks: list[ReadyCheck] | None = None


_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "the request cannot be taken, and why"},
    "5XX": {"model": ErrorBody, "description": "a stage or the store failed"},
}

# Bodies of the largest size that open calls may have: of 256, each with a start image, all would
# take some ten GiB.
_LARGEST_AT_ONCE = 16

_NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"model": Ready, "description": "a stage or the store does not answer"}
}


def build_app(pipeline: "Pipeline") -> FastAPI:
    """Return the ASGI app; it answers every error with `KelvinError.body()`."""
    app = DocumentedApp(
        title="Kelvin",
        version=importlib.metadata.version("kelvin-serve"),
        description="Stable Diffusion 3.5 on Ray Serve; pictures in S3",
        # `Traced` makes the one span. FastAPI would add three that say what it says.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    install_error_handlers(app)
    largest_body = pipeline.settings.pipeline.max_body_bytes
    keys = KeyRing(key_store(pipeline.settings))
    app.add_middleware(HeadAsGet)
    if pipeline.settings.pipeline.early_refusal:
        app.add_middleware(StandsInLine)
    app.add_middleware(Traced)
    app.add_middleware(
        Gate,
        http=pipeline.settings.http,
        keys=keys,
        room=CallRoom(
            pipeline.settings.pipeline.max_ongoing_requests, _LARGEST_AT_ONCE * largest_body
        ),
    )

    async def read_request(request: Request) -> GenerateRequest:
        return GenerateRequest.model_validate(
            with_idempotency_key(request, await read_json(request, largest_body))
        )

    @app.post("/v1/generate", response_model=GenerateResult, responses=_ERRORS, openapi_extra=_BODY)
    async def generate(request: Request) -> Response:
        """Make pictures and wait for them; hanging up cancels the job."""
        return _json(await pipeline.generate(await read_request(request), tenant_of(request)))

    @app.post(
        "/v1/jobs",
        status_code=202,
        response_model=JobRecord,
        responses=_ERRORS,
        openapi_extra=_BODY,
    )
    async def submit(request: Request) -> Response:
        """Accept a job, durably, and return at once; 200 if its key's job has ended already."""
        record = await pipeline.submit(await read_request(request), tenant_of(request))
        response = _json(record, status=200 if record.is_over else 202)
        response.headers["Location"] = f"/v1/jobs/{record.id}"
        return response

    @app.get("/v1/jobs", response_model=JobPage, responses=_ERRORS)
    async def jobs(request: Request, limit: str = "20", after: str | None = None) -> Response:
        """Return some of the caller's jobs, newest first; `next` is `after` of the next page."""
        return _json(await pipeline.jobs(tenant_of(request), _whole(limit), after))

    @app.get("/v1/jobs/{job_id}", response_model=JobRecord, responses=_ERRORS)
    async def job(request: Request, job_id: str) -> Response:
        """Return what is known of a job, through any proxy and after any restart."""
        return _json(await pipeline.job(job_id, tenant_of(request)))

    @app.delete("/v1/jobs/{job_id}", response_model=JobRecord, responses=_ERRORS)
    async def cancel(request: Request, job_id: str, purge: str = "false") -> Response:
        """Cancel a job that has not ended; with `purge=true` delete it, ended or not."""
        if purge not in ("true", "false"):
            raise InvalidRequest(
                "Query parameter 'purge' is neither true nor false.",
                field="purge",
                value=purge,
                allowed="true or false",
            )
        if purge == "true":
            return _json(await pipeline.delete(job_id, tenant_of(request)))
        return _json(await pipeline.cancel(job_id, tenant_of(request)))

    @app.get("/v1/jobs/{job_id}/events", response_class=Response, responses=_ERRORS | _STREAM)
    async def events(request: Request, job_id: str) -> Response:
        """Follow a job: queued, text, step, decode, then stored, failed or cancelled."""
        following = pipeline.events(job_id, tenant_of(request))
        return event_response(await anext(following), following, key_counts(request))

    @app.post(
        "/v1/uploads",
        status_code=201,
        response_model=Upload,
        responses=_ERRORS,
        openapi_extra=_PICTURE,
    )
    async def upload(request: Request) -> Response:
        """Keep a picture, the body, for requests to start from: its URI is their init_image."""
        kept = await pipeline.upload(await read_bytes(request, largest_body), tenant_of(request))
        return _json(kept, status=201)

    @app.get("/v1/jobs/{job_id}/images/{index}", response_class=Response, responses=_ERRORS)
    async def image(request: Request, job_id: str, index: str) -> Response:
        """Return a picture of a job, for who does not reach the store; `url` is quicker."""
        return await stored_picture(pipeline, job_id, index, tenant_of(request))

    @app.get(
        "/v1/jobs/{job_id}/images/{index}/thumbnail", response_class=Response, responses=_ERRORS
    )
    async def small_image(request: Request, job_id: str, index: str) -> Response:
        """Return a picture of a job as a JPEG of at most 320 pixels a side."""
        return await stored_thumbnail(pipeline, job_id, index, tenant_of(request))

    @app.get("/v1/status")
    async def status() -> dict[str, Any]:
        """Return the model, its limits, the store and every replica of every stage."""
        return await pipeline.status()

    @app.get("/v1/usage")
    async def usage(request: Request) -> dict[str, Any]:
        """Return what the caller's tenant has used through one Pipeline, the one that answers."""
        return await pipeline.usage(tenant_of(request))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Return every model with its state: loading, loaded, failed or unloading.

        `object` and `data` say the same as OpenAI's clients read it.
        """
        found = await pipeline.models()
        return {"models": found, "object": "list", "data": [openai_model(each) for each in found]}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Answer while this process lives, whatever the stages and the store do."""
        return {"status": "ok"}

    @app.get("/readyz", response_model=Ready, responses=_ERRORS | _NOT_READY)
    async def readyz(request: Request) -> JSONResponse:
        """Answer 200 when a job sent now would be taken, else 503 and what is missing."""
        found = await pipeline.ready()
        told = found if is_known(request) else {"ready": found["ready"]}
        return JSONResponse(told, status_code=200 if found["ready"] else 503)

    add_doors(app, pipeline, keys)
    return app


def _whole(limit: str) -> int:
    if limit.isascii() and limit.isdigit() and len(limit) < 10:
        return int(limit)
    raise InvalidRequest(
        "Query parameter 'limit' is no number of jobs.",
        field="limit",
        value=limit,
        allowed="an integer from 1 to 100",
    )


def _json(answer: GenerateResult | JobRecord | JobPage | Upload, status: int = 200) -> Response:
    return Response(answer.model_dump_json(), status_code=status, media_type="application/json")
