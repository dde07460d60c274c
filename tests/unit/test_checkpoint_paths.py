"""Which files are read at all: none outside the models folder, no pickle, only regular files."""

import os
from pathlib import Path

import pytest

from serve.checkpoints.header import read_header
from serve.config import ModelSettings
from serve.errors import ConfigurationError
from serve.model_dir import resolve_model_dir
from tests.unit.header_files import (
    NAME,
    checkpoint,
    encoders,
    found,
    large,
    models_folder,
    write_sparse,
)


@pytest.fixture
def models_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return models_folder(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "a/../../secret.safetensors", "a\\b.safetensors"]
)
def test_a_name_does_not_leave_the_models_folder(models_dir, name):
    write_sparse(models_dir.parent / "secret.safetensors", large())
    with pytest.raises(ConfigurationError, match="would leave"):
        found(models_dir, name)


def test_a_link_does_not_leave_the_models_folder(models_dir, tmp_path):
    outside = write_sparse(tmp_path / "outside" / NAME, large())
    (models_dir / "checkpoints").mkdir()
    (models_dir / "checkpoints" / NAME).symlink_to(outside)
    with pytest.raises(ConfigurationError, match="link out of the models folder"):
        found(models_dir)


@pytest.mark.parametrize("whole_folder", [True, False])
def test_encoders_that_are_links_out_are_not_read_and_the_refusal_says_so(
    models_dir, tmp_path, whole_folder
):
    checkpoint(models_dir, large())
    encoders(models_dir)
    folder, elsewhere = models_dir / "text_encoders", tmp_path / "elsewhere"
    folder.rename(elsewhere)
    if whole_folder:
        folder.symlink_to(elsewhere)
    else:
        folder.mkdir()
        for file in elsewhere.iterdir():
            (folder / file.name).symlink_to(file)
    with pytest.raises(ConfigurationError, match=r"has no clip_l, .*leads out of it"):
        found(models_dir)


def test_a_folder_of_checkpoints_is_no_model_and_its_files_are_named(models_dir):
    checkpoint(models_dir, large())
    with pytest.raises(ConfigurationError, match=r"no model_index\.json") as raised:
        resolve_model_dir(ModelSettings(path=str(models_dir / "checkpoints")))
    assert NAME in str(raised.value.allowed)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused(models_dir, suffix):
    (models_dir / "checkpoints").mkdir()
    (models_dir / "checkpoints" / f"a{suffix}").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ConfigurationError, match="pickle"):
        found(models_dir, f"a{suffix}")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, make):
    make(tmp_path / NAME)
    with pytest.raises(ConfigurationError, match="is no regular file"):
        read_header(tmp_path / NAME)


def test_a_pickle_under_another_name_is_refused(models_dir):
    (models_dir / "checkpoints").mkdir()
    (models_dir / "checkpoints" / NAME).write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(ConfigurationError, match="pickle"):
        found(models_dir)
