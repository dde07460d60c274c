"""Scripted readings: what the file says, for the replica it is meant for, marked, never a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.heat_reading import Reading
from cluster.heat_script import HeatScriptError, parse_heat_script
from cluster.scripted_heat import ScriptedHeat
from serve.errors import ConfigurationError
from tests.unit.fake_nvml import Clock

ROOT = Path(__file__).parents[2]
RAMP = [
    {"at_s": 0, "temperature_c": 40, "limit_c": 87, "power_w": 100, "slowdown": 1},
    {"at_s": 10, "temperature_c": 80, "limit_c": 87, "power_w": 700, "clocks_event_reasons": 4},
    {"at_s": 20, "margin_c": 2, "clocks_event_reasons": 0x20, "slowdown": 3},
]


def written(folder: Path, script: Any) -> Path:
    path = folder / "heat.yaml"
    path.write_text(yaml.safe_dump(script))
    return path


def reread(path: Path, text: str) -> None:
    """Rewrite the file as a test in a hurry does: within the same tick of the file's clock."""
    path.write_text(text)
    later = path.stat().st_mtime_ns + 1_000_000
    os.utime(path, ns=(later, later))


def readings(path: Path, *times: float, pool: str = "", index: int = 0) -> list[Reading]:
    clock = Clock()
    source = ScriptedHeat(path, pool=pool, index=index, clock=clock)
    began, found = clock.now, []
    for time in times:
        clock.now = began + time
        reading = source.read()
        assert reading is not None
        assert reading.at == clock.now
        assert reading.source == "scripted"
        found.append(reading)
    return found


def test_an_entry_without_times_is_always_the_same(tmp_path: Path) -> None:
    path = written(tmp_path, {"replicas": [{"temperature_c": 85, "limit_c": 87, "slowdown": 3}]})
    for reading in readings(path, 0, 1, 1e6):
        assert (reading.temperature_c, reading.margin_c, reading.limit_c) == (85.0, 2.0, 87.0)
        assert reading.slowdown == 3.0
        assert reading.power_w is None
        assert reading.clocks_event_reasons is None
        assert reading.problems == ()


def test_between_points_it_goes_in_straight_lines(tmp_path: Path) -> None:
    path = written(tmp_path, {"replicas": [RAMP]})
    start, middle, second, late, end = readings(path, 0, 5, 10, 15, 100)
    assert (start.temperature_c, start.power_w, start.margin_c) == (40.0, 100.0, 47.0)
    assert (middle.temperature_c, middle.power_w, middle.margin_c) == (60.0, 400.0, 27.0)
    assert middle.slowdown == 1.0
    assert middle.clocks_event_reasons is None  # reasons come with their point, not before
    assert (second.temperature_c, second.clocks_event_reasons) == (80.0, 4)
    assert (late.temperature_c, late.margin_c) == (80.0, 7.0)  # what only the first tells stays
    assert (late.clocks_event_reasons, late.is_throttling) == (4, False)
    assert (end.temperature_c, end.margin_c, end.is_throttling) == (None, 2.0, True)
    assert end.slowdown == 3.0


def test_before_the_first_point_nothing_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, {"replicas": [[{"at_s": 5, "temperature_c": 50}]]})
    clock = Clock()
    source = ScriptedHeat(path, index=0, clock=clock)
    assert source.read() is None
    assert "says nothing" in str(source.problem)
    clock.now += 5
    assert source.read() is not None
    assert source.problem is None


def test_pools_and_further_replicas(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {
            "pools": {
                "denoiser": {
                    "replicas": [{"temperature_c": 81}, {"temperature_c": 82}],
                    "default": {"temperature_c": 45},
                },
                "vae-decoder": {"replicas": [{"temperature_c": 60}]},
            }
        },
    )

    def temperature(pool: str, index: int) -> float | None:
        return readings(path, 0, pool=pool, index=index)[0].temperature_c

    assert [temperature("denoiser", i) for i in range(4)] == [81.0, 82.0, 45.0, 45.0]
    assert [temperature("vae-decoder", i) for i in range(2)] == [60.0, 60.0]
    assert ScriptedHeat(path, pool="text-encoder", index=0).read() is None


def test_a_rewritten_file_counts_from_its_beginning(tmp_path: Path) -> None:
    path = written(tmp_path, {"replicas": [{"temperature_c": 40}]})
    clock = Clock()
    source = ScriptedHeat(path, index=0, clock=clock)
    clock.now += 1000
    reread(path, yaml.safe_dump({"replicas": [RAMP]}))
    first = source.read()
    clock.now += 5
    second = source.read()
    assert first is not None
    assert second is not None
    assert (first.temperature_c, second.temperature_c) == (40.0, 60.0)


@pytest.mark.parametrize("damage", ["replicas: [{temperature_c: hot}]", "][", "", "gone"])
def test_a_damaged_file_leaves_the_last_good_one(tmp_path: Path, damage: str) -> None:
    path = written(tmp_path, {"replicas": [RAMP]})
    clock = Clock()
    source = ScriptedHeat(path, index=0, clock=clock)
    clock.now += 5
    if damage == "gone":
        path.unlink()
    else:
        reread(path, damage)
    for _ in range(2):
        reading = source.read()
        assert reading is not None
        assert reading.temperature_c == 60.0
        assert len(reading.problems) == 1
        assert "last good one" in reading.problems[0]
    path.write_text("replicas: [{temperature_c: 33}]")
    mended = source.read()
    assert mended is not None
    assert (mended.temperature_c, mended.problems) == (33.0, ())


@pytest.mark.parametrize(
    ("text", "field", "value", "words"),
    [
        ("replicas: [{temperature_c: hot}]", "replicas.0.0.temperature_c", "hot", "number"),
        ("replicas: [{temperature_c: .nan}]", "replicas.0.0.temperature_c", "nan", "finite"),
        ("replicas: [{temperature_c: 500}]", "replicas.0.0.temperature_c", 500, "200"),
        ("replicas: [{slowdown: 0.5}]", "replicas.0.0.slowdown", 0.5, "1"),
        ("replicas: [{from_s: 3}]", "replicas.0.0.from_s", 3, "not permitted"),
        ("replicas: [[]]", "replicas.0", "[]", "at least 1"),
        ("replicas: [{limit_c: 87}]", "replicas.0.0", "{'limit_c': 87}", "margin_c"),
        ("replicas: [[{at_s: 5}, {at_s: 5}]]", "replicas", None, "larger"),
        ("default: [{at_s: 5}, {at_s: 2}]", "default", None, "larger"),
        ("{}", "", None, "replicas"),
        ("{replicas: [{}], pools: {a: {}}}", "", None, "one of the two"),
        ("- 3", "", None, "mapping"),
        ("a: [", "", None, "YAML"),
    ],
)
def test_a_wrong_file_at_the_start_is_a_configuration_error(
    tmp_path: Path, text: str, field: str, value: Any, words: str
) -> None:
    path = tmp_path / "heat.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        ScriptedHeat(path, index=0)
    assert caught.value.field == (f"thermal.script: {field}" if field else "thermal.script")
    assert str(path) in caught.value.message
    assert words in caught.value.message
    assert caught.value.allowed
    if value is not None:
        assert caught.value.value == value


def test_a_missing_file_and_a_folder_without_room_are_configuration_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ScriptedHeat(tmp_path / "none.yaml")
    assert caught.value.value == str(tmp_path / "none.yaml")
    path = written(tmp_path, {"default": {}})
    (tmp_path / "heat.yaml.claims").write_text("not a folder")
    with pytest.raises(ConfigurationError, match="claim") as caught:
        ScriptedHeat(path)
    assert caught.value.field == "thermal.script"


def test_replicas_take_the_first_line_that_is_free(tmp_path: Path) -> None:
    path = written(tmp_path, {"replicas": [{"temperature_c": 81}, {"temperature_c": 82}]})
    first, second, third = (ScriptedHeat(path, pool="denoiser") for _ in range(3))
    assert [source.index for source in (first, second, third)] == [0, 1, 2]
    assert ScriptedHeat(path, pool="denoiser-l4").index == 0
    second.close()
    second.close()
    again = ScriptedHeat(path, pool="denoiser")
    assert again.index == 1
    del first
    assert ScriptedHeat(path, pool="denoiser").index == 0
    assert third.index == 2


def test_a_killed_replica_leaves_its_line_to_the_next(tmp_path: Path) -> None:
    path = written(tmp_path, {"default": {"temperature_c": 50}})
    program = (
        "import sys; from cluster.scripted_heat import ScriptedHeat;"
        "source = ScriptedHeat(sys.argv[1]);"
        "print(source.index, flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "0\n"
        assert ScriptedHeat(path).index == 1
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    assert ScriptedHeat(path).index == 0


def test_the_description_says_that_it_is_a_rehearsal(tmp_path: Path) -> None:
    path = written(tmp_path, {"default": {}})
    description = ScriptedHeat(path, pool="denoiser", index=2).description
    assert "rehearsal" in description
    assert str(path) in description
    assert "denoiser replica 3" in description


_NAMES = ["at_s", "temperature_c", "limit_c", "margin_c", "slowdown", "clocks_event_reasons"]
_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([])
)
_POINTS = st.dictionaries(st.sampled_from([*_NAMES, "hot"]), _VALUES, max_size=4)
_ENTRIES = st.one_of(_POINTS, st.lists(_POINTS, max_size=3), _VALUES)
_POOLS = st.fixed_dictionaries(
    {}, optional={"replicas": st.lists(_ENTRIES, max_size=3), "default": _ENTRIES}
)


@given(
    script=st.one_of(
        _POOLS, st.fixed_dictionaries({"pools": st.dictionaries(st.just("a"), _POOLS)})
    ),
    index=st.integers(0, 5),
    t_s=st.floats(0, 1e9),
)
def test_any_script_is_refused_in_words_or_gives_sound_readings(
    script: dict[str, Any], index: int, t_s: float
) -> None:
    try:
        parsed = parse_heat_script(yaml.safe_dump(script).encode())
    except HeatScriptError:
        return
    point = parsed.point("a", index, t_s)
    if point is not None:
        reading = point.reading(t_s)
        assert reading.source == "scripted"
        assert 1.0 <= reading.slowdown <= 1000.0


@given(st.one_of(st.binary(), st.text().map(str.encode)))
def test_any_bytes_are_refused_in_words(text: bytes) -> None:
    with pytest.raises(HeatScriptError):
        parse_heat_script(text)


@given(
    temperatures=st.lists(st.floats(-50, 200), min_size=2, max_size=6),
    t_s=st.floats(0, 60),
)
def test_what_is_between_points_lies_between_them(temperatures: list[float], t_s: float) -> None:
    points = [{"at_s": 10 * i, "temperature_c": t} for i, t in enumerate(temperatures)]
    script = parse_heat_script(yaml.safe_dump({"replicas": [points]}).encode())
    point = script.point("any", 0, t_s)
    assert point is not None
    assert point.temperature_c is not None
    last = len(temperatures) - 1
    near = temperatures[min(int(t_s // 10), last) : min(int(t_s // 10) + 2, last + 1)]
    assert min(near) - 1e-9 <= point.temperature_c <= max(near) + 1e-9
