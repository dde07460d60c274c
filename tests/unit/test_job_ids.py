"""Job ids: unique, sortable, and nothing else passes for one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve import job_ids
from serve.errors import JobNotFound


def test_unique_and_well_formed():
    drawn = {job_ids.new_job_id() for _ in range(10_000)}
    assert len(drawn) == 10_000
    assert all(job_ids.checked(job_id) == job_id for job_id in drawn)


@given(st.integers(0, 2**48 - 1), st.integers(0, 2**48 - 1))
def test_sort_by_time(earlier, later):
    earlier, later = sorted((earlier, later))
    with pytest.MonkeyPatch.context() as patch:
        drawn = []
        for milliseconds in (earlier, later):
            patch.setattr(job_ids, "time_ns", lambda now=milliseconds: now * 1_000_000)
            drawn.append(job_ids.new_job_id())
    assert earlier == later or drawn == sorted(drawn)


def test_shards_are_even():
    counts: dict[str, int] = {}
    for _ in range(25_600):
        digits = job_ids.shard(job_ids.new_job_id())
        counts[digits] = counts.get(digits, 0) + 1
    assert len(counts) == 256
    assert max(counts.values()) < 200


@given(st.text())
def test_other_text_is_not_an_id(text):
    if len(text) == 32 and set(text) <= set("0123456789abcdef"):
        return
    with pytest.raises(JobNotFound) as caught:
        job_ids.checked(text)
    assert caught.value.field == "id"


@pytest.mark.parametrize("value", [None, 7, b"0" * 32, ["0" * 32]])
def test_other_types_are_not_ids(value):
    with pytest.raises(JobNotFound):
        job_ids.checked(value)
