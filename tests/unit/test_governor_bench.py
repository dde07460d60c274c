"""The governor's benchmark: what it concludes from samples, and a whole run on a simulated card."""

import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.governor import GovernorSettings
from cluster.thermal import Reading
from loadtest.governor_bench import Bench, Phase
from loadtest.governor_run import Sample, judge, plot
from loadtest.record_step_costs import load_mmdit, record

MARKS = [(0.0, "idle"), (4.0, "free"), (24.0, "held"), (64.0, "lifted")]


def run(held_c: float, settles_s: float) -> list[Sample]:
    samples, done = [], 0.0
    for number in range(84 * 4):
        at = number / 4
        held = 24 <= at < 64
        temperature = 34.0 if at < 4 else 60.0
        if held and at - 24 >= settles_s:
            temperature = held_c
        done += (0.0 if at < 4 else 12.0 if held else 24.0) / 4
        duty = 0.5 if held else 1.0
        samples.append(Sample(at, temperature, None, 500.0, 1500.0, 0, duty, 2, 80.0, 0, int(done)))
    return samples


def test_a_run_that_settles_meets_its_targets() -> None:
    figures = judge(run(held_c=50.5, settles_s=3), MARKS, 50)
    assert all(target["met"] for target in figures["targets"].values()), figures
    assert figures["settled_after_s"] <= 3
    assert figures["throughput_given_up"] == pytest.approx(0.5, abs=0.02)
    assert figures["full_speed_after_s"] == 0
    assert figures["peak_held_c"] == 60


@pytest.mark.parametrize("held_c", [52.5, 47.4])
def test_a_run_that_stays_elsewhere_misses(held_c: float) -> None:
    targets = judge(run(held_c=held_c, settles_s=3), MARKS, 50)["targets"]
    assert not targets["settles_s"]["met"]
    assert not targets["furthest_mean_c"]["met"]


class SimulatedCard:
    """Warms while the engine computes; what share it does is read from its own counter."""

    def __init__(self) -> None:
        self.busy_s = 0.0
        self._rise = 0.0
        self._last = (time.monotonic(), 0.0)

    description = "simulated"
    problem = None

    def read(self) -> Reading | None:
        now, (then, busy) = time.monotonic(), self._last
        share = min((self.busy_s - busy) / max(now - then, 1e-6), 1.0)
        self._last = (now, self.busy_s)
        self._rise += (30 * share - self._rise) * (1 - math.exp(-(now - then) / 0.5))
        return Reading(
            at=now,
            temperature_c=30 + self._rise,
            memory_temperature_c=None,
            margin_c=None,
            power_w=100 + 600 * share,
            power_cap_w=700,
            energy_j=None,
            sm_clock_mhz=1980,
            clocks_event_reasons=0,
            source="scripted",
            problems=(),
        )


def test_a_whole_run_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    mmdit = load_mmdit("tiny", torch.device("cpu"), "fp32")
    costs = record(mmdit, (64,), (2, 4), 0.0, number=1)
    card = SimulatedCard()
    velocity = mmdit.velocity

    def timed(*inputs: Any) -> torch.Tensor:
        began = time.monotonic()
        while time.monotonic() - began < 0.03:
            result = velocity(*inputs)
        card.busy_s += time.monotonic() - began
        return result

    monkeypatch.setattr(mmdit, "velocity", timed)
    bench = Bench(mmdit, costs, card, 64, 2)
    held = GovernorSettings(target_c=40)
    samples, marks = bench.run(
        [Phase("idle", 0.5, None), Phase("free", 2, None), Phase("held", 4, held)]
    )
    assert [name for _, name in marks] == ["idle", "free", "held"]
    assert all(earlier.forwards <= later.forwards for earlier, later in pairwise(samples))
    assert samples[-1].duty < 1
    assert max(each.duty for each in samples if each.seconds < marks[2][0]) == 1
    plot(samples, marks, 40).save(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 1000
