"""What the plan decides in situations a person can follow, and how it says so."""

import math
from dataclasses import replace

import pytest

from cluster.autoscaling import Plan, PlanMemory, PlanSettings, PoolDecision, derating, plan
from cluster.card_kinds import KINDS, card_kind
from cluster.pool_state import PoolState, ReplicaState, Stage

SETTINGS = PlanSettings()


def card(name: str, **told: float | bool | None) -> ReplicaState:
    fields = {"reading_age_s": 0.5, "margin_c": 30.0, "slowdown": 1.0} | told
    return ReplicaState(id=name, **fields)  # type: ignore[arg-type]


def pool(*replicas: ReplicaState, name: str = "denoiser-h100", **told: object) -> PoolState:
    fields: dict[str, object] = {
        "stage": "denoise",
        "model": "large",
        "kind": "H100",
        "target": len(replicas),
        "minimum": 1,
        "maximum": 20,
        "request_s": 2.0,
    }
    return PoolState(name=name, replicas=replicas, **(fields | told))  # type: ignore[arg-type]


def once(*pools: PoolState, settings: PlanSettings = SETTINGS) -> Plan:
    return plan(pools, PlanMemory(), 0.0, settings)[0]


def decision(made: Plan, name: str = "denoiser-h100") -> PoolDecision:
    return next(each for each in made.decisions if each.pool == name)


def steadily(
    state: PoolState, rate: float, seconds: int, settings: PlanSettings = SETTINGS
) -> tuple[PoolState, PlanMemory, list[int]]:
    """Follow the plan for a while; `rate` cool seconds a second come, and never wait."""
    memory = PlanMemory()
    counts = []
    for second in range(seconds):
        share = rate / len(state.replicas)
        replicas = tuple(
            replace(each, accepted_s=each.accepted_s + share) for each in state.replicas
        )
        state = replace(state, replicas=replicas)
        made, memory = plan([state], memory, float(second), settings)
        target = made.replicas[state.name]
        counts.append(target)
        kept = state.replicas[:target]
        new = tuple(
            card(f"{second}-{number}", margin_c=state.replicas[0].margin_c)
            for number in range(target - len(kept))
        )
        state = replace(state, replicas=(*kept, *new), target=target)
    return state, memory, counts


def test_nothing_to_do_leaves_everything_and_says_so() -> None:
    made = decision(once(pool(card("a"), card("b"))))
    assert (made.before, made.after) == (2, 2)
    assert made.reason.startswith("denoiser-h100 stays at 2: 0 s of work waiting")


def test_a_backlog_adds_replicas_and_the_reason_tells_of_waiting_and_of_heat() -> None:
    cards = [card(name, waiting_s=41 * 2.61 / 3, requests=9) for name in "abc"]
    cards[1] = replace(cards[1], margin_c=4.0)
    made = decision(once(pool(*cards, start_s=20.0)))
    assert made.after > 3
    assert made.reason.startswith(f"denoiser-h100 3 -> {made.after}: 41 s of work waiting, ")
    assert "target 10" in made.reason
    assert "1 of 3 cards derated to 0.61 at 4 C margin" in made.reason
    [(name, factor, why)] = made.derated
    assert (name, why) == ("b", "4 C margin")
    assert factor == pytest.approx(0.61, abs=0.01)
    assert made.waiting_s == pytest.approx(41, rel=0.01)


def test_requests_that_share_a_card_wait_too() -> None:
    shared = [card(name, running_s=60.0, requests=30) for name in "ab"]
    alone = [card(name, running_s=60.0, requests=1) for name in "ab"]
    assert decision(once(pool(*shared, start_s=5.0))).after > 2
    assert decision(once(pool(*alone, start_s=5.0))).after == 2


def test_a_backlog_that_is_gone_before_a_replica_has_started_adds_none() -> None:
    cards = [card(name, waiting_s=40.0, requests=20) for name in "ab"]
    assert decision(once(pool(*cards, start_s=5.0))).after > 2
    made = decision(once(pool(*cards, start_s=60.0)))
    assert made.after == 2
    assert "gone before a new replica could begin" in made.reason


def test_replicas_that_start_are_not_ordered_twice() -> None:
    cards = [card(name, waiting_s=60.0, requests=30) for name in "abc"]
    first = decision(once(pool(*cards, start_s=5.0))).after
    again = decision(once(pool(*cards, start_s=5.0, target=first))).after
    assert first > 3
    assert again == first


def test_steady_demand_is_met_at_the_target_utilisation() -> None:
    _, _, counts = steadily(pool(*(card(name) for name in "abc")), 6.0, 400)
    assert counts[-1] == 8  # 6 / 0.75
    assert max(counts) <= 9  # a rise from nothing is overshot by little


def test_hot_cards_need_company_and_cool_ones_need_it_no_more() -> None:
    warm = pool(*(card(name) for name in "abcd"))
    _, _, cool = steadily(warm, 2.6, 300)
    hot = replace(warm, replicas=tuple(replace(each, margin_c=3.0) for each in warm.replicas))
    _, _, heated = steadily(hot, 2.6, 300)
    assert cool[-1] == 4
    assert heated[-1] > 5


def test_a_measured_slowdown_and_a_closed_margin_are_one_loss_not_two() -> None:
    both = once(pool(card("a", margin_c=0.0, slowdown=2.5, throttled=True)))
    assert decision(both).capacity == pytest.approx(0.4)


def test_fewer_only_after_fewer_would_have_done_for_long_enough() -> None:
    state = pool(*(card(f"{number}") for number in range(10)))
    _, _, counts = steadily(state, 3.0, 400)
    first = next(second for second, count in enumerate(counts) if count < 10)
    assert first >= SETTINGS.scale_in_after_s
    assert counts[first] == 8  # a fifth at a time
    assert counts[-1] in (5, 6)
    assert counts == sorted(counts, reverse=True)


def test_nothing_goes_while_the_rest_would_be_too_hot() -> None:
    state = pool(*(card(f"{number}", margin_c=11.0) for number in range(10)))
    _, _, counts = steadily(state, 3.0, 400)
    _, _, cool = steadily(pool(*(card(f"{number}") for number in range(10))), 3.0, 400)
    assert counts[-1] > cool[-1]


def test_nothing_goes_while_replicas_are_silent() -> None:
    state = pool(*(card(f"{number}", age_s=60.0) for number in range(4)))
    _, _, counts = steadily(state, 0.0, 400)
    assert set(counts) == {4}


def test_a_ramp_is_met_before_the_queue_is_there() -> None:
    def ordered(settings: PlanSettings) -> int:
        memory, accepted = PlanMemory(), 0.0
        state = pool(*(card(f"{number}") for number in range(8)), maximum=99)
        for second in range(240):
            accepted += 2 + max(second - 150, 0) / 15
            replicas = (replace(state.replicas[0], accepted_s=accepted), *state.replicas[1:])
            state = replace(state, replicas=replicas)
            made, memory = plan([state], memory, float(second), settings)
        return decision(made).after

    assert ordered(SETTINGS) > ordered(replace(SETTINGS, trend=0.0))


def test_zero_is_left_at_the_first_request_by_all_stages_and_reached_after_idling() -> None:
    def stages(queued: float, targets: tuple[int, int, int]) -> list[PoolState]:
        names: tuple[Stage, ...] = ("text", "denoise", "decode")
        return [
            replace(
                pool(*(card(f"{stage}{number}") for number in range(target)), name=stage),
                stage=stage,
                minimum=0,
                queued=queued if stage == "text" else 0.0,
            )
            for stage, target in zip(names, targets, strict=True)
        ]

    made, memory = plan(stages(0, (0, 0, 0)), PlanMemory(), 0.0, SETTINGS)
    assert set(made.replicas.values()) == {0}
    made, memory = plan(stages(1, (0, 0, 0)), memory, 1.0, SETTINGS)
    assert set(made.replicas.values()) == {1}
    for second in range(2, 400):
        made, memory = plan(stages(0, (1, 1, 1)), memory, float(second), SETTINGS)
        if second <= SETTINGS.idle_after_s:
            assert set(made.replicas.values()) == {1}, second
    assert set(made.replicas.values()) == {0}


def test_decoders_follow_what_denoisers_will_finish() -> None:
    denoisers = tuple(card(f"d{n}", waiting_s=60.0, requests=30) for n in range(60))
    made = once(
        pool(*denoisers, maximum=100),
        replace(pool(card("v"), name="decoder", request_s=0.04), stage="decode"),
    )
    # 100 H100s finish 50 pictures a second; each takes a decoder 0.04 s.
    assert decision(made, "decoder").after >= 2
    assert "the denoisers will send" in decision(made, "decoder").reason


def test_growth_goes_where_cool_capacity_is_cheapest_and_spills_over_at_the_maximum() -> None:
    cheap = pool(card("l"), name="l4", kind="L4", kind_speed=0.1, cost_per_hour=0.5, maximum=8)
    dear = pool(card("h", waiting_s=90.0, requests=45), cost_per_hour=7.0, start_s=10.0)
    made = once(cheap, dear)
    assert decision(made, "l4").after == 8
    assert decision(made).after > 1


def test_growth_avoids_a_pool_whose_cards_are_hot() -> None:
    hot = pool(card("l", margin_c=1.0), name="l4", cost_per_hour=1.0)
    cool = pool(card("h", waiting_s=300.0, requests=150), cost_per_hour=1.5)
    made = once(hot, cool)
    assert decision(made, "l4").after == 1
    assert decision(made).after > 1


def test_the_dearest_for_what_it_does_goes_first() -> None:
    cheap = pool(card("l"), name="l4", kind="L4", cost_per_hour=1.0, minimum=0)
    dear = pool(card("h"), cost_per_hour=7.0, minimum=0)
    memory = PlanMemory()
    for second in range(121):
        made, memory = plan([cheap, dear], memory, float(second), SETTINGS)
    assert made.replicas == {"l4": 1, "denoiser-h100": 0}


def test_stale_heat_is_no_heat_and_is_said() -> None:
    hot = [card(name, margin_c=1.0, throttled=True, reading_age_s=60.0) for name in "abc"]
    made = once(pool(*hot))
    without = once(pool(*hot), settings=replace(SETTINGS, heat=False))
    assert made.replicas == without.replicas
    assert decision(made).capacity == decision(without).capacity == 3.0
    assert any("3 of 3 cards tell no fresh temperature" in each for each in made.warnings)
    assert not without.warnings


@pytest.mark.parametrize(
    "told", [{"reading_age_s": None}, {"reading_age_s": 99.0}, {"age_s": 99.0}]
)
def test_what_is_not_known_lately_derates_nothing(told: dict[str, float | None]) -> None:
    assert derating(card("a", margin_c=0.0, throttled=True, **told), SETTINGS) == 1.0


def test_derating_in_figures() -> None:
    factors = [derating(card("a", margin_c=margin), SETTINGS) for margin in (20, 10, 4, 2, 0, -5)]
    assert factors == pytest.approx([1.0, 1.0, 0.61, 0.46, 0.4, 0.4], abs=0.01)
    assert derating(card("a", throttled=True), SETTINGS) == 0.5
    assert derating(card("a", margin_c=math.nan), SETTINGS) == 1.0


def test_kinds_are_found_by_rays_names_and_unknown_ones_get_a_guess() -> None:
    assert card_kind("H100") is card_kind("nvidia-h100")
    assert KINDS["H100"].speed == 1.0
    assert 0 < KINDS["A10G"].speed < KINDS["L40S"].speed < 1
    assert "guess" in card_kind("Z9").source
