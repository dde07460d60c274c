"""The contract: any JSON object is a GenerateRequest or a KelvinError, never anything else."""

import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serve.errors import InvalidRequest, KelvinError, NotSupportedYet
from serve.requests import LARGEST_SEED, LONGEST_PROMPT, GenerateRequest, JobEvent, JobRecord

_FIELDS = list(GenerateRequest.model_fields)
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.sampled_from(
        [
            0,
            -16,
            16,
            1024,
            10**9,
            10**4000,
            2**64,
            "euler",
            "EULER",
            "png",
            "beta",
            "\ud800",
            "\x00",
        ]
        + [1e308, math.nan, math.inf, -0.0, "", " ", "\u200b", "1024", "a" * (LONGEST_PROMPT + 1)]
    ),
)
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
_OBJECTS = st.builds(
    lambda known, unknown, prompt: {**unknown, **known, **prompt},
    st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=6),
    st.dictionaries(st.text(max_size=8), _JSON, max_size=1),
    st.sampled_from([{}, {"prompt": "a red circle"}, {"prompt": "x"}]),
)


def _check(error: KelvinError) -> None:
    assert error.status == 400
    assert error.message
    assert error.allowed
    json.dumps(error.body(), allow_nan=False, ensure_ascii=False).encode("utf-8")
    assert pickle.loads(pickle.dumps(error)).body() == error.body()


@settings(max_examples=300)
@given(_OBJECTS)
@example({})
@example({"prompt": "x", "": 1})
@example({"prompt": "x", "\ud800": 1})
@example({"prompt": "x", "seed": 10**4200})
@example({"prompt": "x", "RESERVED": []})
@example({"prompt": "x", "model_config": {}})
@example({"prompt": "x", "__class__": "y"})
def test_any_object_is_a_request_or_a_typed_error(data: dict[str, Any]):
    try:
        request = GenerateRequest.model_validate(data)
    except KelvinError as error:
        _check(error)
        return
    assert GenerateRequest.model_validate_json(request.model_dump_json()) == request
    assert pickle.loads(pickle.dumps(request)) == request
    assert request.prompt.strip()
    assert request.guidance_scale is None or 0 <= request.guidance_scale <= 100


@settings(max_examples=200)
@given(_JSON)
def test_anything_else_is_a_typed_error(data: Any):
    if isinstance(data, dict):
        return
    with pytest.raises(InvalidRequest) as caught:
        GenerateRequest.model_validate(data)
    assert caught.value.allowed == "a JSON object"


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "\\ud800"}',
        '{"\\ud800": "x", "prompt": "x"}',
        '{"prompt": "x", "guidance_scale": NaN}',
        '{"prompt": "x", "guidance_scale": 1e999}',
        '{"prompt": "x", "seed": ' + "9" * 4000 + "}",
        '{"prompt": ' + "[" * 900 + "]" * 900 + "}",
        '{"' + "x" * 100_000 + '": 1, "prompt": "x"}',
    ],
)
def test_awkward_json_is_a_typed_error_of_a_sane_size(text):
    with pytest.raises(InvalidRequest) as caught:
        GenerateRequest.model_validate(json.loads(text))
    body = json.dumps(caught.value.body(), allow_nan=False, ensure_ascii=False).encode("utf-8")
    assert len(body) < 3_000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", "   \n"),
        ("prompt", "x" * (LONGEST_PROMPT + 1)),
        ("prompt", None),
        ("prompt", 7),
        ("prompt", b"bytes"),
        ("prompt", "\ud800"),
        ("negative_prompt", "x" * (LONGEST_PROMPT + 1)),
        ("width", 0),
        ("width", -256),
        ("width", 250),
        ("width", 256.0),
        ("width", "256"),
        ("width", True),
        ("height", 8),
        ("num_inference_steps", 0),
        ("num_inference_steps", 10**9),
        ("guidance_scale", math.nan),
        ("guidance_scale", math.inf),
        ("guidance_scale", -1.0),
        ("guidance_scale", "4"),
        ("sampler", "ddim"),
        ("sampler", "Euler"),
        ("scheduler", "karras"),
        ("shift", 0.0),
        ("shift", math.inf),
        ("max_sequence_length", 513),
        ("seed", -1),
        ("seed", LARGEST_SEED + 1),
        ("seed", 1.5),
        ("num_images", 0),
        ("num_images", 17),
        ("output_format", "gif"),
        ("quality", 0),
        ("quality", 101),
        ("model", ""),
        ("priority", 11),
        ("priority", -11),
        ("priority", 1.0),
        ("priority", True),
        ("priority", "high"),
        ("deadline_s", 0),
        ("deadline_s", -1.0),
        ("deadline_s", math.nan),
        ("deadline_s", math.inf),
        ("deadline_s", "30"),
        ("guidance_interval", [0.9, 0.1]),
        ("guidance_interval", [0.5, 0.5]),
        ("guidance_interval", "0.1,0.9"),
        ("guidance_interval", {0.1, 0.9}),
        ("guidance_interval", 0.5),
        ("negative_prompt_range", [0.1, 0.0]),
        ("negative_prompt_range", None),
        ("preview_every", -1),
        ("preview_every", 201),
        ("preview_every", 2.5),
        ("embed_prompt", "yes"),
        ("embed_prompt", 1),
    ],
)
def test_bad_value_names_field_value_and_what_is_allowed(field, value):
    with pytest.raises(InvalidRequest) as caught:
        GenerateRequest.model_validate({"prompt": "a red circle", field: value})
    error = caught.value
    assert error.field == field
    assert error.allowed == GenerateRequest.allowed()[field]
    assert error.allowed
    if isinstance(value, str) and len(value) < 100 and value.isascii():
        assert error.value == value


@pytest.mark.parametrize("field", ["guidance_interval", "negative_prompt_range"])
@pytest.mark.parametrize(
    "pair", [[-0.1, 1.0], [0.0, 1.5], [math.nan, 1.0], [0.0, math.inf], [0.1], [0.1, 0.2, 0.3]]
)
def test_a_bad_interval_names_the_field_its_number_and_what_is_allowed(field, pair):
    with pytest.raises(InvalidRequest) as caught:
        GenerateRequest.model_validate({"prompt": "x", field: pair})
    assert str(caught.value.field).split(".")[0] == field
    assert caught.value.allowed == GenerateRequest.allowed()[field]


@given(st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_an_interval_is_taken_exactly_where_it_rises(pair):
    fields = {"prompt": "x", "guidance_interval": list(pair), "negative_prompt_range": pair}
    if pair[0] < pair[1]:
        request = GenerateRequest.model_validate(fields)
        assert request.guidance_interval == request.negative_prompt_range == pair
        again = GenerateRequest.model_validate_json(request.model_dump_json())
        assert again == request
    else:
        with pytest.raises(InvalidRequest):
            GenerateRequest.model_validate(fields)


def test_whole_numbers_are_numbers_and_a_priority_may_be_absent():
    request = GenerateRequest.model_validate(
        {"prompt": "x", "guidance_interval": [0, 1], "deadline_s": 30, "priority": None}
    )
    assert request.guidance_interval == (0.0, 1.0)
    assert (request.deadline_s, request.priority) == (30.0, 0)
    plain = GenerateRequest(prompt="x")
    assert (plain.guidance_interval, plain.deadline_s) == (None, None)
    assert (plain.negative_prompt_range, plain.preview_every) == ((0.0, 1.0), 0)


def test_every_field_says_what_is_allowed():
    assert all(GenerateRequest.allowed().values())


def test_missing_prompt():
    with pytest.raises(InvalidRequest, match="'prompt' is required"):
        GenerateRequest.model_validate({})


def test_unknown_field_is_told_the_known_ones():
    with pytest.raises(InvalidRequest) as caught:
        GenerateRequest.model_validate({"prompt": "x", "steps": 4})
    assert caught.value.field == "steps"
    assert caught.value.value == 4
    assert "num_inference_steps" in str(caught.value.allowed)


@pytest.mark.parametrize("field", GenerateRequest.RESERVED)
def test_reserved_field_is_not_supported_yet(field):
    with pytest.raises(NotSupportedYet) as caught:
        GenerateRequest.model_validate({"prompt": "x", field: 1})
    assert caught.value.field == field
    assert GenerateRequest.model_validate({"prompt": "x", field: None}).prompt == "x"


@pytest.mark.parametrize(
    "prompt", ["ein Kreis", "红色的圆", "🟥 left of 🔵", "a\u0301", "a\x00b", "x" * LONGEST_PROMPT]
)
def test_good_prompts(prompt):
    request = GenerateRequest(prompt=prompt)
    assert GenerateRequest.model_validate_json(request.model_dump_json()).prompt == prompt


def test_constructor_raises_the_same():
    with pytest.raises(InvalidRequest):
        GenerateRequest(prompt="x", width=17)
    with pytest.raises(InvalidRequest):
        GenerateRequest(prompt="x", no_such_field=1)  # type: ignore[call-arg]


def test_frozen():
    request = GenerateRequest(prompt="x")
    with pytest.raises((TypeError, ValueError)):
        request.prompt = "y"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("event", "last"),
    [("queued", False), ("text", False), ("step", False), ("decode", False)]
    + [("stored", True), ("failed", True), ("cancelled", True)],
)
def test_last_event(event, last):
    assert JobEvent(event=event, id="x").is_last is last


def test_record_round_trip():
    record = JobRecord(
        id="x", status="failed", request=GenerateRequest(prompt="x"), error={"error": {"code": "y"}}
    )
    assert JobRecord.model_validate_json(record.model_dump_json()) == record


@pytest.mark.parametrize("field", ["guidance_interval", "negative_prompt_range"])
@pytest.mark.parametrize("value", [[], [0.1, 0.2, 0.3], "0.1,0.2", 0.5, {"low": 0.1}])
def test_what_is_no_pair_is_told_so_in_the_words_of_json(field, value):
    with pytest.raises(InvalidRequest) as refused:
        GenerateRequest.model_validate_json(json.dumps({"prompt": "a", field: value}))
    error = refused.value
    assert "two numbers in a list" in error.message
    assert "uple" not in error.message
    assert error.field == field
    assert error.value == (value if isinstance(value, str | float) else repr(value))


def test_of_a_pair_that_lacks_a_number_the_list_is_shown():
    with pytest.raises(InvalidRequest) as refused:
        GenerateRequest.model_validate({"prompt": "a", "guidance_interval": [0.1]})
    assert refused.value.value == "[0.1]"


@pytest.mark.parametrize("data", [None, [], "a prompt", 3])
def test_what_is_no_request_at_all_names_no_field(data):
    with pytest.raises(InvalidRequest) as refused:
        GenerateRequest.model_validate(data)
    assert refused.value.field is None
    assert refused.value.message.startswith("The request: ")
    assert "None" not in refused.value.message


def test_a_hundred_thousand_wrong_things_are_refused_at_the_first(
    monkeypatch: pytest.MonkeyPatch,
):
    """Else a body of a MiB would hold up everybody for a second."""
    listed: list[int] = []
    translate = InvalidRequest.from_validation

    def counting(error: ValidationError, allowed: dict[str, str]) -> InvalidRequest:
        listed.append(error.error_count())
        return translate(error, allowed)

    monkeypatch.setattr(InvalidRequest, "from_validation", counting)
    with pytest.raises(InvalidRequest, match="loras"):
        GenerateRequest.model_validate(
            {"prompt": "a", "loras": [{"name": "x", "weight": "b"}] * 50_000}
        )
    assert listed == [9]
    many = {"prompt": 5, **{f"a{number}": number for number in range(100_000)}}
    with pytest.raises(InvalidRequest, match="Unknown field 'a0'") as caught:
        GenerateRequest.model_validate(many)
    assert "prompt" in str(caught.value.allowed)
    assert listed == [9], "pydantic was not asked"
    one = {"name": "x", **{f"a{number}": number for number in range(100_000)}}
    with pytest.raises(InvalidRequest, match="loras"):
        GenerateRequest.model_validate({"prompt": "a", "loras": [one]})
    assert listed == [9, 2], "of one LoRA's fields as well"
