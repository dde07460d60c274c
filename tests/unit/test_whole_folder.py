"""A folder is there whole or not at all, whoever else writes it."""

from pathlib import Path

import pytest

from serve.whole_folder import written_whole


def test_it_is_there_once_it_is_whole(tmp_path: Path):
    target = tmp_path / "new" / "model"
    with written_whole(target) as folder:
        (folder / "a").write_text("a")
        assert not target.exists()
    assert (target / "a").read_text() == "a"
    assert list(target.parent.iterdir()) == [target]


def test_who_comes_second_leaves_what_the_first_has_written(tmp_path: Path):
    target = tmp_path / "model"
    with written_whole(target) as slower:
        (slower / "a").write_text("second")
        with written_whole(target) as faster:
            (faster / "a").write_text("first")
    assert (target / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("bad")])
def test_what_fails_in_the_midst_leaves_nothing(tmp_path: Path, error: Exception):
    def write() -> None:
        with written_whole(tmp_path / "model") as folder:
            (folder / "a").touch()
            raise error

    with pytest.raises(type(error)):
        write()
    assert not list(tmp_path.iterdir())
