"""A recorded load is read, or it is said which line and column are wrong."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadtest.trace_csv import Recorded, read_trace
from serve.errors import InvalidRequest

PROMPTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(
    lambda text: text.strip() == text
)
ROWS = st.lists(
    st.tuples(
        st.integers(0, 5000),
        st.none() | st.integers(1, 64).map(lambda side: 16 * side),
        st.none() | st.integers(1, 200),
        st.none() | PROMPTS,
    ),
    min_size=1,
    max_size=20,
)
ONE_FILE = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(ROWS)
@ONE_FILE
def test_what_is_written_is_read(tmp_path: Path, rows: list[tuple[int, ...]]):
    rows = sorted(rows, key=lambda row: row[0])
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["at_s", "width", "num_inference_steps", "prompt"])
    writer.writerows(
        [at / 100, *("" if each is None else each for each in row)] for at, *row in rows
    )
    file = tmp_path / "trace.csv"
    file.write_text(text.getvalue(), encoding="utf-8")
    names = ("width", "num_inference_steps", "prompt")
    assert read_trace(file) == [
        Recorded(
            at / 100,
            {name: each for name, each in zip(names, row, strict=True) if each is not None},
        )
        for at, *row in rows
    ]


@given(st.binary(max_size=200))
@ONE_FILE
def test_anything_else_is_refused_in_words(tmp_path: Path, data: bytes):
    file = tmp_path / "trace.csv"
    file.write_bytes(data)
    refused = None
    try:
        rows = read_trace(file)
    except InvalidRequest as error:
        refused, rows = error, []
    # Anything but these two, such as csv's own errors, would be a traceback.
    assert rows or (refused is not None and refused.allowed)


@pytest.mark.parametrize(
    ("text", "field", "value", "words"),
    [
        ("", "trace", "", "at_s"),
        ("at_s\n", "trace", None, "at least one row"),
        ("at_s,speed\n0,1\n", "trace", "speed", "at_s"),
        ("prompt\na\n", "trace", "prompt", "at_s"),
        ("at_s,at_s\n0,0\n", "trace", "at_s,at_s", "once"),
        ("at_s,width\n0\n", "trace", 1, "2 values"),
        ("at_s\n1\n0.5\n", "trace.at_s", "0.5", "not before"),
        ("at_s\nsoon\n", "trace.at_s", "soon", "seconds"),
        ("at_s\nnan\n", "trace.at_s", "nan", "seconds"),
        ("at_s\n-1\n", "trace.at_s", "-1", "seconds"),
        ("at_s,width\n0,wide\n", "trace.width", "wide", "multiple of 16"),
        ("at_s,width\n0,17\n", "trace.width", 17, "multiple of 16"),
        ("at_s,num_inference_steps\n0,0\n", "trace.num_inference_steps", 0, "1 to 200"),
        ('at_s,prompt\n0,"a\n', "trace", None, "CSV"),
    ],
)
def test_the_place_is_named(tmp_path: Path, text: str, field: str, value: object, words: str):
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(InvalidRequest) as refused:
        read_trace(file)
    error = refused.value
    assert error.field == field
    assert value is None or error.value == value
    assert words in (error.allowed or "")


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_trace(tmp_path / "none.csv")
