"""Previews in files: the newest, whole, beside the picture they become."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from serve.commands.previews import PreviewFiles
from serve.errors import InvalidRequest
from serve.requests import JobEvent


def step(number: int, data: bytes | None, image: int = 0) -> JobEvent:
    preview = None if data is None else base64.b64encode(data).decode()
    return JobEvent(event="step", id="7", image=image, step=number, steps=9, preview=preview)


def test_the_newest_preview_replaces_the_one_before(tmp_path: Path):
    files = PreviewFiles(tmp_path / "out.png", 1)
    files.save(step(1, None))
    assert list(tmp_path.iterdir()) == []
    for number in (2, 4):
        files.save(step(number, b"%d" % number))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "out.preview.jpg": b"4"
    }


def test_each_picture_of_several_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    files = PreviewFiles(None, 2)
    files.save(step(1, b"a", image=0))
    files.save(step(1, b"b", image=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "kelvin-7-0.preview.jpg",
        "kelvin-7-1.preview.jpg",
    ]


def test_a_preview_that_is_none_is_left_out_and_a_folder_that_is_gone_is_said(tmp_path: Path):
    broken = JobEvent(event="step", id="7", preview="no base64!")
    PreviewFiles(tmp_path / "out.png", 1).save(broken)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InvalidRequest) as caught:
        PreviewFiles(tmp_path / "gone" / "out.png", 1).save(step(1, b"a"))
    assert caught.value.field == "preview_every"
