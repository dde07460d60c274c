"""What a person may set about how many replicas there are, with the reasons of each default."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """How the plan weighs waiting, heat and cost.

    Attributes:
        target_wait_s: Work that waits longer than this, at the speed the cards have now, is too
            much; a backlog beyond it is to be gone within as long again. Where a request itself
            takes longer than this, waiting may take as long as it.
        target_utilisation: Share of the cards' present capacity that arriving work may take.
        burst_reserve: Spare replicas as a multiple of the square root of the busy ones. Few
            replicas need relatively more of them for the same wait (square-root staffing: Halfin
            and Whitt, Operations Research 29, 1981); beyond some tens the utilisation rules.
        scale_in_after_s: Fewer replicas must have been enough for so long without a break.
        after_surprise_s: Work that waited twice the target came too suddenly to be met. For so long
            after it is over replicas stay for the most that came: what came suddenly may come
            again, and who starts then is late for it. Half an hour, since what people and their
            timers do comes again by the half hour rather than by the minute. Where that much load
            stays, it is the usual load after as long.
        scale_in_step_s: Between two steps down: the rest must show that it holds the load.
        scale_in_share: Of a group's replicas that one step may take away; always at least one.
        scale_in_band: Fewer are enough only this far below the target utilisation, so that noise
            does not take away now what it asks for again in a minute.
        idle_after_s: A model without any request for so long goes to zero, where minimum is 0.
        stale_after_s: Readings and reports older than this say nothing about the present.
        late_start: A replica that takes this many times as long to start as it should is not
            counted on any more, and its pool is asked last.
        fast_s: Time constant of the quick average of demand, which sees a burst.
        slow_s: Time constant of the slow average of demand, which sees through noise.
        noise: Standard deviations of Poisson arrivals that the quick average must exceed the slow
            one by, before it counts.
        trend: How much of a rise between the averages is carried forward over the time that a
            replica takes to start: 1 takes it for a ramp, more for the beginning of a step, of
            which averages show less than there is; 0 ignores it.
        most_ahead: The forecast never exceeds demand by more than this share of it.
        heat: Whether temperature and measured speed count at all; without, queue and demand alone.
        cool_margin_c: From this many degrees under its limit on, a card counts in full.
        least_factor: What is left of a card's capacity when its margin is gone.
        throttled_factor: At most so much of a card counts while it says that it is throttled.
        full_load_rise_c: By how much full load heats a card over idle; 27 C on the recorded H100.
            What the rest of the cards would get hotter after a scale-in follows from it.
    """

    target_wait_s: float = 10.0
    target_utilisation: float = 0.75
    burst_reserve: float = 0.7
    scale_in_after_s: float = 120.0
    after_surprise_s: float = 1800.0
    scale_in_step_s: float = 30.0
    scale_in_share: float = 0.2
    scale_in_band: float = 0.05
    idle_after_s: float = 300.0
    stale_after_s: float = 10.0
    late_start: float = 2.0
    fast_s: float = 10.0
    slow_s: float = 90.0
    noise: float = 2.0
    trend: float = 1.5
    most_ahead: float = 0.75
    heat: bool = True
    cool_margin_c: float = 10.0
    least_factor: float = 0.4
    throttled_factor: float = 0.5
    full_load_rise_c: float = 27.0
