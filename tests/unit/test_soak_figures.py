"""What counts as growth: what lasts, and not what a sample happened to see."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from loadtest.process_census import Process
from loadtest.soak_figures import MIB, Sample, draw_soak, report_of

PREFIXES = ("pending/", "leases/", "jobs/", "images/")
CLEAN = dict.fromkeys(PREFIXES, 0)


def run(
    rss_mib: Callable[[int], float] = lambda _: 200.0,
    descriptors: Callable[[int], int] = lambda _: 30,
    objects: Callable[[int], int] = lambda _: 50,
    store_mib: Callable[[int], float] = lambda _: 100.0,
) -> list[Sample]:
    """Two thousand jobs, a sample every 25 of them."""
    draw = random.Random(1)
    return [
        Sample(
            at=done / 5,
            done=done,
            processes=[
                Process(7, "pipeline", int((rss_mib(done) + draw.gauss(0, 1)) * MIB), 0, 20),
                Process(8, "weed", int(store_mib(done) * MIB), 0, descriptors(done)),
                Process(done + 100, "worker", MIB, 0, 3),
            ],
            object_store_bytes=draw.choice((0.0, 0.5 * MIB)),
            objects=dict.fromkeys(PREFIXES, objects(done) + draw.choice((0, 3))),
        )
        for done in range(0, 2001, 25)
    ]


def grown(samples: list[Sample], left: dict[str, int] = CLEAN) -> Any:
    report = report_of(samples, [], left)
    assert report["ok"] == (not report["grown"] and not any(left.values()))
    return report["grown"]


def test_what_is_flat_is_flat_whatever_single_samples_saw():
    assert grown(run()) == []
    # A cache that fills, and then is full.
    assert grown(run(rss_mib=lambda done: 150 + min(done, 600) / 12)) == []
    # For a moment twice as much.
    assert grown(run(rss_mib=lambda done: 400.0 if done % 400 == 0 else 200.0)) == []
    assert len(report_of(run(), [], CLEAN)["came_or_went"]) > 10


def test_what_grows_is_named():
    assert grown(run(rss_mib=lambda done: 200 + done / 80)) == ["rss_mib pipeline (7)"]
    assert grown(run(descriptors=lambda done: 30 + done // 250)) == ["descriptors weed (8)"]
    assert len(grown(run(objects=lambda done: done // 10))) == len(PREFIXES)


def test_the_store_may_remember_changes_but_keep_no_pictures():
    assert grown(run(store_mib=lambda done: 100 + done * 28 / 1024)) == []
    assert grown(run(store_mib=lambda done: 100 + done * 80 / 1024)) == ["rss_mib weed (8)"]


def test_what_no_sweep_removes_and_jobs_that_end_wrongly_are_no_success():
    assert not report_of(run(), [], CLEAN | {"pending/": 1})["ok"]
    assert not report_of(run(), [{"status": "failed"}], CLEAN)["ok"]
    assert report_of(run(), [], CLEAN | {"leases/": 1})["ok"], "a living Pipeline has one"


def test_it_can_be_drawn():
    assert draw_soak(run()).width > 900
