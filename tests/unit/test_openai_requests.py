"""Whatever a client of OpenAI's API sends becomes a request or a typed error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import KelvinError
from serve.http.openai_errors import openai_body, openai_edit_body
from serve.http.openai_requests import asked_of, body_schema, edit_schema
from serve.requests import GenerateRequest

_NAMES = [
    *GenerateRequest.model_fields,
    *("n", "size", "response_format", "output_compression", "background", "stream"),
    *("partial_images", "lora", "user", "quality", "frame_count"),
]
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["auto", "16x16", "url", "high", "png", 1, 2, "0x0", "99999x1"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@given(
    body=st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=5)
    | st.dictionaries(st.text(max_size=5), _VALUES, max_size=2)
    | _VALUES
)
def test_any_json_is_a_request_or_a_typed_error(body: Any):
    if isinstance(body, dict):
        body = {"prompt": "a", **body}
    try:
        asked = asked_of(body)
    except KelvinError as error:
        _check(error)
    else:
        assert GenerateRequest.model_validate(asked.request) == asked.request
        assert 0 <= asked.partial_images <= 3


def _check(error: KelvinError) -> None:
    assert error.status == 400
    for shape in (openai_body, openai_edit_body):
        told = shape(error)["error"]
        assert told["type"] == "invalid_request_error"
        assert told["allowed"]
        assert told["allowed"] in told["message"]
        assert told["param"] == told["field"] is not None
        json.dumps(told, allow_nan=False)


@pytest.mark.parametrize(
    ("lora", "loras"),
    [
        ("ink", [("ink", 1.0)]),
        ({"name": "ink", "scale": 0.5}, [("ink", 0.5)]),
        (["ink", {"name": "oil", "weight": -1}], [("ink", 1.0), ("oil", -1.0)]),
    ],
)
def test_a_lora_is_a_name_an_object_or_several(lora: Any, loras: list[tuple[str, float]]):
    asked = asked_of({"prompt": "a", "lora": lora})
    assert [(each.name, each.weight) for each in asked.request.loras] == loras


@pytest.mark.parametrize(
    "given_twice",
    [
        {"lora": "ink", "loras": [{"name": "oil"}]},
        {"lora": {"name": "ink", "scale": 0.5, "weight": 1.0}},
        {"lora": ["oil", {"name": "ink", "scale": 0.5, "weight": 0.5}]},
    ],
)
def test_what_is_said_under_two_names_is_refused(given_twice: dict[str, Any]):
    with pytest.raises(KelvinError) as caught:
        asked_of({"prompt": "a", **given_twice})
    assert (caught.value.field, caught.value.allowed) == ("lora", "one of them")


def test_a_field_that_openai_has_another_name_for_is_known_by_that_one():
    with pytest.raises(KelvinError) as caught:
        asked_of({"prompt": "a", "num_images": 2})
    assert caught.value.field == "num_images"
    assert " n, " in str(caught.value.allowed)
    with pytest.raises(KelvinError) as caught:
        asked_of({"prompt": "a", "n": 17})
    assert openai_body(caught.value)["error"]["param"] == "n"
    assert "'n'" in openai_body(caught.value)["error"]["message"]


def test_the_schemas_list_what_is_taken():
    known = set(body_schema()["properties"])
    assert {"prompt", "n", "size", "lora", "strength", "user"} <= known
    for name in known - {"prompt"}:
        try:
            asked_of({"prompt": "a", name: None})
        except KelvinError as error:
            pytest.fail(f"{name}: {error}")
    assert set(edit_schema()["properties"]) == known - {"init_image"} | {"image"}
