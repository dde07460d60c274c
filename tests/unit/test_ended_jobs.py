"""What is kept of jobs that have ended: their events, of the newest, in few bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve.ended_jobs import EndedJobs
from serve.requests import GenerateRequest, GenerateResult, JobEvent

STEPS = st.integers(0, 60)


def events_of(job_id: str, steps: int) -> list[JobEvent]:
    done = [
        JobEvent(event="step", id=job_id, image=0, step=step + 1, steps=steps)
        for step in range(steps)
    ]
    result = GenerateResult(
        id=job_id,
        model="pico",
        request=GenerateRequest(prompt="a kite", seed=7),
        images=(),
        stages=(),
        seconds=1.25,
    )
    return [
        JobEvent(event="queued", id=job_id),
        *done,
        JobEvent(event="stored", id=job_id, result=result),
    ]


@given(steps=STEPS)
def test_events_come_back_as_they_were(steps: int):
    kept, told = EndedJobs(), events_of("a", steps)
    kept.keep("a", "default", told)
    assert kept.events("a", "default") == told
    assert kept.last("a", "default") == told[-1]


def test_only_its_tenant_is_told():
    kept = EndedJobs()
    kept.keep("a", "red", events_of("a", 3))
    assert kept.events("a", "blue") == []
    assert kept.events("b", "red") == []
    assert len(kept.events("a", "red")) == 5


@given(jobs=st.lists(STEPS, min_size=1, max_size=30), most=st.integers(0, 2000))
def test_the_oldest_go_first_and_the_bytes_stay_below_the_most(jobs: list[int], most: int):
    kept = EndedJobs(most)
    for number, steps in enumerate(jobs):
        kept.keep(str(number), "default", events_of(str(number), steps))
    left = list(kept)
    assert left == [str(number) for number in range(len(jobs) - len(left), len(jobs))]
    assert kept._bytes == sum(len(each.packed) for each in kept._jobs.values()) <= most


def test_a_job_kept_again_is_kept_once_and_one_forgotten_is_gone():
    kept = EndedJobs()
    for steps in (3, 5):
        kept.keep("a", "default", events_of("a", steps))
    assert len(kept.events("a", "default")) == 7
    kept.forget("a")
    kept.forget("a")
    assert kept.events("a", "default") == []
    assert kept._bytes == 0


def test_a_job_of_twenty_steps_takes_less_than_a_kilobyte():
    kept = EndedJobs()
    kept.keep("a", "default", events_of("a", 20))
    assert kept._bytes < 1024
