"""What is counted as ahead: all that was taken on, and nothing of what is over."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cluster.work_sizes import Asked, WorkSizes, asked_picture, asked_prompts, asked_steps
from serve.requests import GenerateRequest, JobEvent
from serve.work_ahead import WorkAhead

POOLS: Any = {"text": ("t",), "denoise": ("d", "e"), "decode": ("v",)}
STEP, PICTURE = asked_steps(64, 32, 2), asked_picture(64, 32)


def asked(num_images: int = 2) -> GenerateRequest:
    return GenerateRequest(
        prompt="a",
        width=64,
        height=32,
        num_inference_steps=10,
        guidance_scale=4.0,
        num_images=num_images,
    )


def event(name: Any, **fields: Any) -> JobEvent:
    return JobEvent(event=name, id="1", **fields)


def test_progress_leaves_less_to_do_and_repeated_steps_more():
    ahead = WorkAhead()
    left = ahead.take_on(asked(), "acme", POOLS)
    assert ahead.of(("t",)) == {"acme": {asked_prompts(2): 1}}
    assert ahead.of(("d", "e")) == {"acme": {STEP: 20}}
    left.seen(event("text"))
    assert not ahead.of(("t",))
    left.seen(event("step", image=1, step=7, steps=10))
    assert ahead.of(("d", "e"))["acme"][STEP] == 13
    left.seen(event("step", image=1, step=5, steps=10))
    assert ahead.of(("d", "e"))["acme"][STEP] == 15
    left.seen(event("decode", image=1))
    assert ahead.of(("d", "e"))["acme"][STEP] == 10
    assert ahead.of(("v",)) == {"acme": {PICTURE: 1}}
    other = ahead.take_on(asked(1), "globex", POOLS)
    assert ahead.of(("v",)) == {"acme": {PICTURE: 1}, "globex": {PICTURE: 1}}
    left.seen(event("cancelled"))
    assert left.undone == 0.5
    other.gone()
    assert not any(ahead.of(pools) for pools in POOLS.values())
    left.seen(event("step", image=0, step=1, steps=10))
    assert not ahead.of(("d", "e")), "what is over does not come back"


steps = st.builds(
    lambda image, step: event("step", image=image, step=step, steps=10),
    st.integers(0, 3),
    st.integers(1, 10),
)
events = st.lists(
    steps
    | st.just(event("text"))
    | st.integers(0, 3).map(lambda image: event("decode", image=image))
)


@given(st.lists(st.tuples(st.integers(1, 3), events), max_size=4))
def test_after_the_last_event_nothing_is_left(jobs):
    ahead = WorkAhead()
    all_left = [(ahead.take_on(asked(images), "acme", POOLS), seen) for images, seen in jobs]
    for left, seen in all_left:
        for each in seen:
            left.seen(each)
        for tenants in map(ahead.of, POOLS.values()):
            assert all(number > 0 for counts in tenants.values() for number in counts.values())
    for left, _ in all_left:
        left.seen(event("stored"))
    assert not any(ahead.of(pools) for pools in POOLS.values())


def test_a_size_never_seen_is_guessed_from_the_nearest():
    sizes = WorkSizes()
    assert sizes.asked_s(STEP) is None
    sizes.learn(asked_steps(64, 64, 2), 10, 2.0)
    sizes.learn(asked_steps(512, 512, 2), 10, 40.0)
    sizes.learn(asked_picture(64, 32), 1, 9.0)
    sizes.learn((64, 32, 77, True), 10, 5.0)
    assert sizes.asked_s(asked_steps(64, 64, 2)) == 0.2
    assert sizes.asked_s(STEP) == 0.1
    assert sizes.asked_s(asked_steps(1024, 512, 2)) == 8.0
    assert sizes.asked_s(Asked("prompts", 2)) is None
