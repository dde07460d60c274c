"""Everything a caller can get wrong: one typed error, the same over HTTP and by handle."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve.errors import InvalidRequest, KelvinError, NotSupportedYet
from serve.requests import LONGEST_PROMPT, GenerateRequest
from tests.ray.world import FAST, World

INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "empty prompt": ({"prompt": ""}, "prompt"),
    "blank prompt": ({"prompt": " \n\t"}, "prompt"),
    "over-long prompt": ({"prompt": "a" * (LONGEST_PROMPT + 1)}, "prompt"),
    "over-long negative prompt": (
        {"negative_prompt": "a" * (LONGEST_PROMPT + 1)},
        "negative_prompt",
    ),
    "lone surrogate": ({"prompt": "a \ud800 b"}, "prompt"),
    "prompt of the wrong type": ({"prompt": 7}, "prompt"),
    "width no multiple of 16": ({"width": 65}, "width"),
    "height no multiple of 16": ({"height": 100}, "height"),
    "zero width": ({"width": 0}, "width"),
    "negative height": ({"height": -16}, "height"),
    "too wide for the model": ({"width": 1 << 20}, "width"),
    "too high for the model": ({"height": 1 << 20}, "height"),
    "too many pixels for the model": ({"width": 1040, "height": 1024}, "width"),
    "width as text": ({"width": "64"}, "width"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps"),
    "a billion steps": ({"num_inference_steps": 10**9}, "num_inference_steps"),
    "half a step": ({"num_inference_steps": 2.5}, "num_inference_steps"),
    "guidance not a number": ({"guidance_scale": float("nan")}, "guidance_scale"),
    "infinite guidance": ({"guidance_scale": float("inf")}, "guidance_scale"),
    "negative guidance": ({"guidance_scale": -1.0}, "guidance_scale"),
    "infinite shift": ({"shift": float("-inf")}, "shift"),
    "zero shift": ({"shift": 0.0}, "shift"),
    "shift so small that noise levels coincide": ({"shift": 1e-30}, "shift"),
    "unknown sampler": ({"sampler": "ddim"}, "sampler"),
    "unknown scheduler": ({"scheduler": "karras"}, "scheduler"),
    "unknown field": ({"promt": "a cat"}, "promt"),
    "unknown format": ({"output_format": "gif"}, "output_format"),
    "negative seed": ({"seed": -1}, "seed"),
    "seed out of range": ({"seed": 2**64}, "seed"),
    "no pictures": ({"num_images": 0}, "num_images"),
    "too many pictures": ({"num_images": 17}, "num_images"),
    "quality out of range": ({"quality": 101}, "quality"),
    "sequence too long": ({"max_sequence_length": 513}, "max_sequence_length"),
    "interval that falls": ({"guidance_interval": [0.9, 0.1]}, "guidance_interval"),
    "range beyond the end": ({"negative_prompt_range": [0.5, 1.5]}, "negative_prompt_range.1"),
    "priority too high": ({"priority": 11}, "priority"),
    "deadline in the past": ({"deadline_s": -1.0}, "deadline_s"),
    "endless deadline": ({"deadline_s": float("inf")}, "deadline_s"),
    "previews of half steps": ({"preview_every": 0.5}, "preview_every"),
}
RESERVED = {name: ({name: 1}, name) for name in GenerateRequest.RESERVED}


def by_handle(world: World, request: dict[str, Any] | GenerateRequest) -> KelvinError:
    """Send what nobody has checked on this side of the handle; return what the Pipeline raised."""
    with pytest.raises(KelvinError) as caught:
        world.handle.generate.remote(request).result()
    return caught.value


@pytest.mark.parametrize(("fields", "field"), (INVALID | RESERVED).values(), ids=INVALID | RESERVED)
@pytest.mark.parametrize("route", ["/v1/generate", "/v1/jobs"])
def test_a_wrong_field_is_named(world: World, route: str, fields: dict[str, Any], field: str):
    # Python's json writes NaN, Infinity and lone surrogates, as careless clients do.
    answer = world.http.post(
        route,
        content=json.dumps(FAST | fields).encode(),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == ("NotSupportedYet" if field in RESERVED else "InvalidRequest")
    assert error["field"] == field
    assert error["value"] is not None
    assert error["allowed"]
    assert error["message"]
    if route == "/v1/generate":
        raised = by_handle(world, FAST | fields)
        assert isinstance(raised, NotSupportedYet if field in RESERVED else InvalidRequest)
        assert raised.body() == answer.json()


def test_a_missing_prompt_is_named(world: World):
    answer = world.http.post("/v1/generate", json={})
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == "prompt"
    assert by_handle(world, {}).body() == answer.json()


@pytest.mark.parametrize(
    ("field", "value"), [("width", 1 << 20), ("width", 65), ("num_images", 17), ("shift", -1.0)]
)
def test_a_request_changed_after_it_was_checked_is_checked_again(
    world: World, field: str, value: Any
):
    answer = world.http.post("/v1/generate", json=FAST | {field: value})
    raised = by_handle(world, GenerateRequest(**FAST).model_copy(update={field: value}))
    assert isinstance(raised, InvalidRequest)
    assert raised.status == 400
    assert raised.field == field
    assert raised.body() == answer.json()


def test_an_unknown_model_is_told_the_known_ones(world: World):
    answer = world.http.post("/v1/generate", json=FAST | {"model": "sdxl"})
    name = world.http.get("/v1/status").json()["model"]["name"]
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert name in answer.json()["error"]["allowed"]
    assert by_handle(world, FAST | {"model": "sdxl"}).body() == answer.json()


def test_bodies_that_are_not_json(world: World):
    for body in (b"", b"{", b"prompt=cat", b'{"prompt": "\xff\xfe"}', b"\x80", b"[" * 100_000):
        answer = world.http.post(
            "/v1/generate", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400, body
        assert answer.json()["error"]["type"] == "InvalidRequest"
        assert answer.json()["error"]["field"] == "body"


@pytest.mark.parametrize("body", ["null", "3", '"a cat"', "[]"])
def test_json_that_is_no_object(world: World, body: str):
    answer = world.http.post("/v1/generate", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "InvalidRequest"


def test_no_content_type_is_taken_as_json(world: World):
    answer = world.http.post("/v1/generate", content=json.dumps(FAST).encode())
    assert "content-type" not in answer.request.headers
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "content_type", ["application/x-www-form-urlencoded", "text/plain", "image/png", "json", ";"]
)
def test_a_wrong_content_type_is_refused(world: World, content_type: str):
    answer = world.http.post(
        "/v1/generate", content=json.dumps(FAST), headers={"content-type": content_type}
    )
    assert answer.status_code == 415
    assert answer.json()["error"]["type"] == "UnsupportedMediaType"
    assert answer.json()["error"]["value"] == content_type


@pytest.mark.parametrize("announced", [True, False], ids=["with length", "chunked"])
def test_a_huge_body_is_refused(world: World, announced: bool):
    assert world.kelvin is not None
    body = b'{"prompt": "' + b"a" * world.kelvin.settings.pipeline.max_body_bytes + b'"}'
    content: Any = (
        body if announced else iter([body[at : at + 65536] for at in range(0, len(body), 65536)])
    )
    answer = world.http.post("/v1/generate", content=content)
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "PayloadTooLarge"
    # The server goes on.
    assert world.http.get("/healthz").status_code == 200


def test_unknown_routes_and_methods_answer_alike(world: World):
    unknown = world.http.get("/v2/everything")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "route_not_found"
    method = world.http.put("/v1/generate", json={})
    assert method.status_code == 405
    assert method.json()["error"]["code"] == "method_not_allowed"
    assert "POST" in method.headers["allow"]


def test_openapi_lists_every_route(world: World):
    document = world.http.get("/openapi.json").json()
    # Doors for other programs' clients are tagged with those.
    own = {
        path: {method for method, route in routes.items() if "tags" not in route}
        for path, routes in document["paths"].items()
    }
    assert {path: methods for path, methods in own.items() if methods} == {
        "/v1/generate": {"post"},
        "/v1/jobs": {"get", "post"},
        "/v1/jobs/{job_id}": {"get", "delete"},
        "/v1/jobs/{job_id}/events": {"get"},
        "/v1/jobs/{job_id}/images/{index}": {"get"},
        "/v1/jobs/{job_id}/images/{index}/thumbnail": {"get"},
        "/v1/session": {"delete", "get", "post"},
        "/v1/models": {"get"},
        "/v1/uploads": {"post"},
        "/v1/status": {"get"},
        "/v1/usage": {"get"},
        "/healthz": {"get"},
        "/readyz": {"get"},
    }
    assert "post" in document["paths"]["/v1/images/generations"]
    body = document["paths"]["/v1/generate"]["post"]["requestBody"]["content"]["application/json"]
    assert set(GenerateRequest.model_fields) == set(body["schema"]["properties"])


def test_a_request_id_comes_back(world: World):
    answer = world.http.get("/healthz", headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert world.http.get("/healthz").headers["x-request-id"]
