"""Jobs whose Pipelines die again and again are taken over ever more slowly, and one at a time."""

from __future__ import annotations

from serve.relapses import Relapses


def test_a_few_deaths_cost_no_time():
    relapses = Relapses(10.0)
    assert all(relapses.may_start("a", attempts, (), 0.0) for attempts in (1, 2, 3))


def test_each_further_death_doubles_the_pause_up_to_ten_minutes():
    relapses = Relapses(10.0)
    assert [relapses.pause_s(attempts) for attempts in (4, 5, 6)] == [10.0, 20.0, 40.0]
    assert relapses.pause_s(20) == relapses.pause_s(999_999) == 600.0


def test_the_pause_counts_from_when_the_orphan_was_seen_after_that_death():
    relapses = Relapses(10.0)
    assert not relapses.may_start("a", 4, (), 100.0)
    assert not relapses.may_start("a", 4, (), 109.0)
    assert relapses.may_start("a", 4, (), 110.0)
    # Another Pipeline took it, and died of it.
    assert not relapses.may_start("a", 5, (), 111.0)
    assert not relapses.may_start("a", 5, (), 130.0)
    assert relapses.may_start("a", 5, (), 131.0)


def test_one_at_a_time():
    relapses = Relapses(10.0)
    for job in ("a", "b"):
        relapses.may_start(job, 4, (), 0.0)
    assert relapses.may_start("a", 4, (), 10.0)
    relapses.started("a", 4)
    assert not relapses.may_start("b", 4, ("a",), 20.0)
    assert relapses.may_start("c", 2, ("a",), 20.0), "what is new waits for nobody"
    assert relapses.may_start("b", 4, (), 20.0), "the other one has ended"


def test_what_is_no_orphan_any_more_is_forgotten():
    relapses = Relapses(10.0)
    relapses.may_start("a", 4, (), 0.0)
    relapses.keep(())
    assert not relapses.may_start("a", 4, (), 20.0)
