"""The measurements' command lines: what cannot work is refused in words, never by a traceback."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from loadtest import (
    adherence,
    coldstart,
    denoise_bench,
    fidelity,
    lora_adherence,
    record_step_costs,
)
from loadtest.command_line import run_in_words, whole

BENCH = (denoise_bench, ["--device", "cpu", "--model", "tiny", "--size", "64"])
FIDELITY = (fidelity, ["--device", "cpu", "--model", "tiny"])
COLDSTART = (coldstart, ["--device", "cpu", "--model", "tiny", "--size", "64"])
RECORD = (record_step_costs, ["--device", "cpu", "--model", "tiny", "--out", "costs.json"])
ADHERENCE = (adherence, ["--device", "cpu"])
LORA = (lora_adherence, ["--device", "cpu"])
ALL = (BENCH, FIDELITY, COLDSTART, RECORD, ADHERENCE, LORA)

BAD = [
    *((script, ["--device", "banana"]) for script in ALL),
    *((script, ["--device", "meta"]) for script in ALL),
    *((script, ["--device", f"cuda:{torch.cuda.device_count()}"]) for script in ALL),
    *(
        (script, ["--out", value])
        for script in (BENCH, FIDELITY, COLDSTART, RECORD)
        for value in ("/nonexistent/x.json", "/tmp")
    ),
    *((script, ["--rows", n]) for script in (BENCH, RECORD, ADHERENCE) for n in ("0", "100000")),
    *((BENCH, ["--sustained", value]) for value in ("inf", "nan", "-1", "1e9", "long")),
    *(
        (script, ["--size", size])
        for script in (BENCH, FIDELITY, COLDSTART)
        for size in ("1000000", "0", "100", "1e3", "9" * 5000)
    ),
    (COLDSTART, ["--dir", "/proc/x"]),
    (COLDSTART, ["--dir", "/nonexistent/x/y"]),
    (COLDSTART, ["--warm-rows", "1,65"]),
    (COLDSTART, ["--steps", "0"]),
    (RECORD, ["--sides", "127"]),
    (RECORD, ["--number", "0"]),
    (RECORD, ["--warm-s", "nan"]),
    (RECORD, ["--precision", "int4"]),
    (FIDELITY, ["--reference", "/nonexistent"]),
    (FIDELITY, ["--model", "none"]),
    (ADHERENCE, ["--reference", "/nonexistent"]),
    (ADHERENCE, ["--pictures", "/proc/x"]),
    (ADHERENCE, ["--seed", "-1"]),
    (LORA, ["--lora", "/nonexistent.safetensors"]),
    (LORA, ["--sheet", "/nonexistent/x.png"]),
    (LORA, ["--shape", "circle"]),
]


@pytest.mark.parametrize(("script", "arguments"), BAD)
def test_a_silly_argument_is_named_before_anything_is_made(script, arguments, capsys):
    module, good = script
    with pytest.raises(SystemExit) as refused:
        module.main([*good, *arguments])
    assert refused.value.code == 2
    told = capsys.readouterr().err
    assert arguments[0] in told
    assert len(told) < 3000


def test_with_no_model_and_no_prompts_there_is_nothing_to_do(capsys):
    with pytest.raises(SystemExit):
        fidelity.main(["--model", "none", "--device", "cpu"])
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        (BENCH, ["--pretend", "sm_86"], "pretend"),
        (FIDELITY, ["--pretend", "sm_89", "--size", "64"], "pretend"),
        (BENCH, ["--size", "1024"], "512"),
        (FIDELITY, ["--size", "1024"], "512"),
        (COLDSTART, ["--size", "1024"], "512"),
        (RECORD, ["--sides", "1024", "--rows", "1"], "512"),
        (ADHERENCE, ["--width", "2048"], "width"),
        (ADHERENCE, ["--model", "/nonexistent"], "/nonexistent"),
    ],
)
def test_what_model_or_machine_cannot_do_is_told_in_words(
    script, arguments, named, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    module, good = script
    if script is FIDELITY:
        good = [*good, "--seeds", "1", "--sigmas", "1"]
    assert module.main([*good, *arguments]) == 1
    told = capsys.readouterr().err
    assert "Error: " in told
    assert "Traceback" not in told
    assert named in told
    assert list(tmp_path.iterdir()) == []


def test_a_full_card_is_told_in_words(capsys):
    def run(options: argparse.Namespace) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 80 GiB")

    assert run_in_words(run, argparse.Namespace()) == 1
    assert "80 GiB" in capsys.readouterr().err


def test_a_folder_that_is_only_checked_is_not_left_behind(tmp_path: Path):
    folder = tmp_path / "new"
    options = coldstart.parse_arguments(["--device", "cpu", "--dir", str(folder)])
    assert options.dir == folder
    assert not folder.exists()


def test_bounds_are_allowed_themselves():
    assert [whole(1, 64)(text) for text in ("1", "64")] == [1, 64]
