"""What a load test's outcomes come to, and whether its report says what must be known."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loadtest.load_charts import charts_of
from loadtest.load_figures import LoadRun, figures_of, is_sound
from loadtest.load_plan import Ask, LoadPlan
from loadtest.outcomes import Outcome, read_outcomes, write_outcome
from loadtest.picture_proof import NOT_A_PICTURE, WRONG_BYTES, WRONG_SIZE, fault_in, fault_in_stored
from loadtest.report_page import page
from loadtest.report_words import findings
from loadtest.status_log import StatusSample, sample_of
from loadtest.svg_chart import Chart, Series, svg

REQUEST = {"prompt": "a <b>", "width": 64, "height": 64, "num_inference_steps": 4}
RIGHT = Outcome(0, "native", 0.0, 0.001, 1.0, server_s=0.9, queue_s=0.2, joules=10.0)


def run(*outcomes: Outcome, due: int | None = None, slo_s: float = 2.0) -> LoadRun:
    number = len(outcomes) if due is None else due
    asks = tuple(Ask(index, float(index), "native", dict(REQUEST)) for index in range(number))
    told = [replace(each, number=index, at=float(index)) for index, each in enumerate(outcomes)]
    sample = StatusSample(1000.5, {"denoise": 0.5}, {"denoiser": 2}, {"r": {"temperature_c": 61.0}})
    return LoadRun(LoadPlan(asks, 10.0), told, [sample], 1000.0, slo_s)


GENERATOR = {"rate": 200.0, "requests": 9, "p50_ms": 1.0, "p99_ms": 9.0, "most_ms": 60.0}


def report_of(load: LoadRun, is_bottleneck: bool = False) -> dict[str, Any]:
    about = {
        "command": "kelvin loadtest <x>",
        "date": "today",
        "machine": {"cpu": "x"},
        "model": "pico",
        "profile": "steady",
        "requests": len(load.plan.asks),
        "duration_s": 10.0,
        "doors": ["native"],
        "mix": "varied",
        "prompts": "general",
        "slo_words": "as given",
        "notes": [],
    }
    generator = {**GENERATOR, "is_bottleneck": is_bottleneck}
    return {"run": about, "generator": generator, "figures": figures_of(load)}


def test_in_time_counts_what_is_right_and_soon_enough_of_all_that_were_due():
    late, refused = replace(RIGHT, latency_s=3.0), replace(RIGHT, error="overloaded", status=429)
    figures = figures_of(run(RIGHT, RIGHT, late, refused, due=5))
    assert figures["slo"] == {"seconds": 2.0, "attainment": 0.4, "goodput": 0.2}
    assert figures["requests"] == {
        "due": 5,
        "right": 3,
        "failed": 1,
        "unheard": 1,
        "shed": 1,
        "wrong_pictures": 0,
    }
    assert figures["errors"] == {"overloaded": 1}
    assert figures["arrival_rate"] == 0.5
    assert figures["completion_rate"] == 0.3
    assert figures["latency_s"]["max"] == 3.0
    assert figures["energy"] == {"joules_per_image": 10.0, "images": 3}
    assert figures["cards"]["temperature_c"]["most"] == 61.0


def test_a_run_goes_on_until_its_last_picture():
    slow = replace(RIGHT, latency_s=20.0)
    figures = figures_of(run(slow))
    assert figures["completion_rate"] == pytest.approx(1 / 20)
    assert figures["drained_after_s"] == 10.0


@pytest.mark.parametrize(
    ("outcomes", "due", "sound"),
    [
        ((RIGHT,), 1, True),
        ((RIGHT, replace(RIGHT, error="overloaded")), 2, True),
        ((RIGHT, replace(RIGHT, error=WRONG_BYTES)), 2, False),
        ((RIGHT, replace(RIGHT, error="stage_failed", status=500)), 2, False),
        ((RIGHT,), 2, False),
        ((replace(RIGHT, error="overloaded"),), 1, False),
        ((), 1, False),
    ],
)
def test_to_refuse_is_sound_and_to_lose_is_not(outcomes: Any, due: int, sound: bool):
    figures = figures_of(run(*outcomes, due=due))
    assert is_sound(figures) is sound


@pytest.mark.parametrize(
    ("adherence", "sound"),
    [
        ({"judged": 0}, True),
        ({"judged": 9, "right": 7, "share": 0.78, "from": 0.45, "to": 0.94}, True),
        ({"judged": 3, "right": 1, "share": 0.33, "from": 0.06, "to": 0.79}, True),
        ({"judged": 40, "right": 2, "share": 0.05, "from": 0.01, "to": 0.17}, False),
    ],
)
def test_pictures_of_other_things_are_wrong_pictures(adherence: dict[str, float], sound: bool):
    report = report_of(run(RIGHT))
    report["figures"]["adherence"] = adherence
    assert is_sound(report["figures"]) is sound
    assert any("show what their prompts state" in each for each in findings(report)) is not sound


def test_a_report_says_when_the_generator_was_the_bottleneck():
    quick, slow = run(RIGHT), run(replace(RIGHT, late_s=0.5))
    assert findings(report_of(quick)) == []
    (words,) = findings(report_of(slow))
    assert "generator was the bottleneck" in words
    assert "not to be trusted" in findings(report_of(quick, is_bottleneck=True))[0]


def test_a_report_says_why_it_knows_not_all_of_the_replicas():
    report = report_of(run(RIGHT))
    report["figures"]["status_problem"] = "No Kelvin answers."
    (words,) = findings(report)
    assert words.endswith("No Kelvin answers.")


def test_the_page_holds_all_and_escapes_what_others_wrote(tmp_path: Any):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "a.png")
    load = run(RIGHT, replace(RIGHT, error="<script>alert(1)</script>"))
    html = page(report_of(load), charts_of(load), [("a <b>", tmp_path / "a.png")])
    assert "<script" not in html
    assert "a &lt;b&gt;" in html
    assert not re.findall(r"(?:src|href)=\"(?!data:)", html)
    assert html.count("<figure>") >= 6


def test_a_run_without_answers_has_a_page_too():
    load = LoadRun(run(due=3).plan, [], [], 1000.0, 1.0)
    html = page(report_of(load), charts_of(load), [])
    assert "not known" in html
    assert "nothing was heard" in html


POINTS = st.lists(st.tuples(st.floats(0, 1e4), st.none() | st.floats(-1e6, 1e6)), max_size=30).map(
    lambda points: sorted(points, key=lambda point: point[0])
)


@given(st.lists(POINTS, max_size=3), st.sampled_from(["line", "stairs", "dots", "area"]))
@settings(max_examples=80, deadline=None)
def test_a_chart_of_anything_stays_within_its_frame(series: Any, look: str):
    drawn = svg(Chart("anything", [Series("a", points, look) for points in series]))
    for value in re.findall(r'c?y(?:1|2)?="(-?[\d.]+)"', drawn):
        assert 0 <= float(value) <= 210
    for path in re.findall(r' d="([^"]+)"', drawn):
        numbers = [float(each) for each in re.findall(r"-?[\d.]+(?:e-?\d+)?", path)]
        assert all(-0.1 <= each <= 520.1 for each in numbers)


def test_a_record_that_was_cut_off_is_read_as_far_as_it_goes():
    file = StringIO()
    for number in (1, 0):
        write_outcome(replace(RIGHT, number=number), file)
    whole = file.getvalue()
    lines = StringIO(whole + whole[:30])
    assert [each.number for each in read_outcomes(lines)] == [0, 1]


def test_pictures_are_proved(tmp_path: Any):
    file = tmp_path / "a.png"
    Image.new("RGB", (64, 32), "blue").save(file)
    data = file.read_bytes()
    assert fault_in(data, 64, 32) == ""
    assert fault_in(data, 32, 64) == WRONG_SIZE
    assert fault_in(data[: len(data) // 2], 64, 32) == NOT_A_PICTURE
    assert fault_in(b"", 64, 32) == NOT_A_PICTURE
    assert fault_in_stored(data, "0" * 64) == WRONG_BYTES


def test_a_status_without_cards_or_load_is_read():
    replica = {"stage": "denoise", "pool": "denoiser", "replica": "r", "load": None, "heat": None}
    other = {**replica, "load": {"waiting_s": 3.0}, "heat": {"power_w": 300, "temperature_c": None}}
    sample = sample_of({"stages": {"denoise": [replica, other]}}, 1.0)
    assert sample.waiting_s == {"denoise": 1.5}
    assert sample.replicas == {"denoiser": 2}
    assert sample.cards == {"r": {"power_w": 300.0}}
