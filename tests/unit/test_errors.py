"""Typed errors: the same body at every door, across process boundaries, and always JSON."""

import inspect
import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve import errors
from serve.errors import KelvinError

_ALL = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, KelvinError) and cls.__module__ == errors.__name__
]
_STATUS = {
    "KelvinError": 500,
    "InvalidRequest": 400,
    "NotSupportedYet": 400,
    "PayloadTooLarge": 413,
    "UnsupportedMediaType": 415,
    "ModelNotFound": 404,
    "ModelLoading": 503,
    "ModelConflict": 409,
    "JobNotFound": 404,
    "Unauthenticated": 401,
    "Forbidden": 403,
    "ForeignOrigin": 403,
    "KeyNotFound": 404,
    "BodyTooSlow": 408,
    "JobConflict": 409,
    "JobCancelled": 409,
    "Overloaded": 429,
    "LimitReached": 429,
    "IdempotencyConflict": 409,
    "RecordUnreadable": 500,
    "StorageUnavailable": 503,
    "StageUnavailable": 503,
    "DeadlineExceeded": 504,
    "StageFailed": 500,
    "ConfigurationError": 500,
}


class _Awkward:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


_TEXTS = st.text() | st.sampled_from(["a \ud800 b", "\udfff" * 300])
_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.lists(st.integers()),
    st.dictionaries(st.text(), st.floats()),
    st.sampled_from(["\ud800", "x" * 10_000, b"\xff" * 10_000, object()]),
)


def test_statuses_and_codes():
    assert {cls.__name__: cls.status for cls in _ALL} == _STATUS
    assert len({cls.code for cls in _ALL}) == len(_ALL)


@settings(max_examples=300)
@given(
    cls=st.sampled_from(_ALL),
    message=_TEXTS,
    field=st.none() | _TEXTS,
    value=_VALUES,
    allowed=st.none() | _TEXTS,
)
def test_body_is_small_json_and_survives_pickling(cls, message, field, value, allowed):
    error = cls(message, field=field, value=value, allowed=allowed)
    body = error.body()
    text = json.dumps(body, allow_nan=False, ensure_ascii=False)
    text.encode("utf-8")
    assert json.loads(text) == body
    assert len(json.dumps(body["error"]["value"], ensure_ascii=False)) < 2_000
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert again.body() == body
    assert str(again) == str(error) == error.message
    assert body["error"]["type"] == cls.__name__
    assert body["error"]["code"] == cls.code


def _deep() -> list[object]:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    return nested


@pytest.mark.parametrize("make", [lambda: 10**5000, _Awkward, _deep], ids=["int", "repr", "deep"])
def test_value_that_cannot_be_shown(make):
    error = errors.InvalidRequest("no", value=make())
    json.dumps(error.body())
    assert error.value


def test_raised_in_another_process():
    code = (
        "import pickle, sys\n"
        "from serve.errors import JobNotFound\n"
        "error = JobNotFound('gone', field='id', value='x', allowed='another')\n"
        "sys.stdout.buffer.write(pickle.dumps(error))\n"
    )
    data = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    error = pickle.loads(data)
    assert isinstance(error, errors.JobNotFound)
    assert error.body()["error"] == {
        "type": "JobNotFound",
        "code": "job_not_found",
        "message": "gone",
        "field": "id",
        "value": "x",
        "allowed": "another",
    }


def test_subclass_made_elsewhere_shows_its_public_name():
    # Ray raises a class of its own that inherits from ours.
    class RayTaskError(errors.Overloaded):
        pass

    assert RayTaskError("busy").body()["error"]["type"] == "Overloaded"
