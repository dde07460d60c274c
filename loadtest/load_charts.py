"""The charts of a load test's report: what happened over the time of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loadtest.latencies import percentile
from loadtest.load_figures import LoadRun
from loadtest.status_log import StatusSample
from loadtest.svg_chart import Chart, Point, Series

_MOST_BINS, _REQUESTS_A_BIN = 40, 6
_MOST_DOTS = 1500
_STAGES = {"text": "text encoding", "denoise": "denoising", "decode": "decoding"}
_MOST_CARDS = 6


def charts_of(run: LoadRun) -> list[Chart]:
    """Return the charts, in the order in which they are read; x is seconds of the run."""
    right = [each for each in run.outcomes if not each.error]
    end = max([run.plan.duration_s, *(each.at + each.latency_s for each in run.outcomes)])
    due = [ask.at for ask in run.plan.asks]
    done = [each.at + each.latency_s for each in right]
    in_time = [each.at + each.latency_s for each in right if each.latency_s <= run.slo_s]
    # Few requests in many bins would look like noise.
    bins = max(4, min(_MOST_BINS, len(due) // _REQUESTS_A_BIN))
    every = max(1, -(-len(run.outcomes) // _MOST_DOTS))
    shown = run.outcomes[::every]
    failed = [(each.at, each.latency_s) for each in shown if each.error]
    slo = ((run.slo_s, f"in time: {run.slo_s:.3g} s"),)
    charts = [
        Chart(
            "Requests a second",
            [
                Series("due", _rates(due, end, bins), "area"),
                Series("pictures", _rates(done, end, bins)),
                Series("in time", _rates(in_time, end, bins)),
            ],
            x_end=end,
        ),
        Chart(
            "Latency by when it was due, s",
            [
                Series("pictures", [(o.at, o.latency_s) for o in shown if not o.error], "dots"),
                Series("p95", _p95([(o.at, o.latency_s) for o in right], end / bins)),
                *([Series("failed", failed, "dots", is_bad=True)] if failed else []),
            ],
            levels=slo,
            x_end=end,
        ),
        Chart(
            "Share of pictures within so many seconds",
            [Series("pictures", _cumulative([each.latency_s for each in right]), "stairs")],
        ),
        Chart(
            "Waiting work by stage, s",
            [Series(words, _over(run, _waiting(stage))) for stage, words in _STAGES.items()],
            x_end=end,
        ),
        Chart(
            "Replicas that answer, by pool",
            [
                Series(pool, _over(run, _replicas(pool)), "stairs")
                for pool in sorted({pool for each in run.samples for pool in each.replicas})
            ],
            x_end=end,
        ),
        Chart(
            "Lateness of the generator, ms",
            [Series("sent later than due", [(o.at, 1000 * o.late_s) for o in shown], "dots")],
            x_end=end,
        ),
    ]
    return charts + [chart for chart in _cards(run, end) if any(s.points for s in chart.series)]


def _cards(run: LoadRun, end: float) -> list[Chart]:
    replicas = sorted({replica for each in run.samples for replica in each.cards})[:_MOST_CARDS]
    titles = {"temperature_c": "Temperature of the cards, °C", "power_w": "Power of the cards, W"}
    return [
        Chart(
            title,
            [Series(replica[-12:], _over(run, _reading(replica, name))) for replica in replicas],
            x_end=end,
        )
        for name, title in titles.items()
    ]


def _over(run: LoadRun, read: Callable[[StatusSample], float | None]) -> list[Point]:
    return [(max(each.at - run.began, 0.0), read(each)) for each in run.samples]


def _waiting(stage: str) -> Callable[[StatusSample], float | None]:
    return lambda sample: sample.waiting_s.get(stage)


def _replicas(pool: str) -> Callable[[StatusSample], float | None]:
    return lambda sample: sample.replicas.get(pool, 0)


def _reading(replica: str, name: str) -> Callable[[StatusSample], float | None]:
    return lambda sample: sample.cards.get(replica, {}).get(name)


def _rates(times: Sequence[float], end: float, bins: int) -> list[Point]:
    width = end / bins
    counts = [0] * bins
    for at in times:
        counts[min(int(at / width), bins - 1)] += 1
    return [((index + 0.5) * width, count / width) for index, count in enumerate(counts)]


def _p95(latencies: Sequence[tuple[float, float]], width: float) -> list[Point]:
    bins: dict[int, list[float]] = {}
    for at, latency in latencies:
        bins.setdefault(int(at / width), []).append(latency)
    return [
        ((index + 0.5) * width, percentile(sorted(bins[index]), 0.95)) for index in sorted(bins)
    ]


def _cumulative(latencies: Sequence[float]) -> list[Point]:
    ordered = sorted(latencies)
    every = max(1, len(ordered) // 200)
    points: list[Point] = [(0.0, 0.0)]
    points += [
        (ordered[index], (index + 1) / len(ordered)) for index in range(0, len(ordered), every)
    ]
    return [*points, (ordered[-1], 1.0)] if ordered else []
