"""What a denoiser holds: nothing in use is put out, nobody starves, failures reach who asked."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch

from deployments.lora_shelf import LoraShelf
from deployments.payloads import LoraUse
from deployments.sd3.lora_arena import HostPage
from serve.errors import ConfigurationError, InvalidRequest, StageFailed

WAIT_S = 10


class Files:
    """Files whose sizes are their names' last digits."""

    def __init__(self) -> None:
        self.read_names: list[str] = []
        self.failing: dict[str, Exception] = {}
        self.gate = threading.Event()
        self.gate.set()

    def pages(self, use: LoraUse) -> int:
        if use.name.startswith("absent"):
            raise InvalidRequest("no such file", field="loras")
        return int(use.name[-1])

    def read(self, use: LoraUse) -> Sequence[HostPage]:
        assert self.gate.wait(WAIT_S)
        self.read_names.append(use.name)
        if use.name in self.failing:
            raise self.failing[use.name]
        return [_page(use.name, at) for at in range(self.pages(use))]


class Arena:
    """Notes what its pages hold."""

    def __init__(self, pages: int) -> None:
        self.pages = self.most_a_row = pages
        self.contents: dict[int, tuple[str, int]] = {}

    def write(self, page: int, content: HostPage) -> None:
        self.contents[page] = _names[content.values.data_ptr()]


_names: dict[int, tuple[str, int]] = {}
_kept: list[torch.Tensor] = []


def _page(name: str, at: int) -> HostPage:
    values = torch.zeros(1)
    _kept.append(values)
    _names[values.data_ptr()] = (name, at)
    return HostPage(values, ())


class Shelf:
    """A shelf with its files and arena."""

    def __init__(self, pages: int) -> None:
        self.files = Files()
        self.arena = Arena(pages)
        self.shelf = LoraShelf(self.arena, self.files)

    def ask(self, holder: int, *names: str) -> None:
        self.shelf.check([LoraUse(name, 1.0) for name in names])
        self.shelf.want(holder, [LoraUse(name, 1.0) for name in names])

    def take(self, holder: int, *names: str) -> list[tuple[str, int]]:
        """Wait until all are held; returns what is in the pages."""
        until(lambda: self.shelf.hold(holder))
        pages = self.shelf.pages(holder, [LoraUse(name, 1.0) for name in names])
        return [self.arena.contents[page] for page, _ in pages]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def four() -> Iterator[Shelf]:
    made = Shelf(4)
    yield made
    made.shelf.close()


def test_files_are_read_once_for_all_who_use_them_and_each_has_its_weight(four):
    four.ask(1, "cat1", "dog2")
    assert four.take(1, "cat1", "dog2") == [("cat1", 0), ("dog2", 0), ("dog2", 1)]
    four.shelf.want(2, [LoraUse("dog2", -0.5)])
    until(lambda: four.shelf.hold(2))
    assert [weight for _, weight in four.shelf.pages(2, [LoraUse("dog2", -0.5)])] == [-0.5, -0.5]
    assert sorted(four.files.read_names) == ["cat1", "dog2"]
    assert set(four.shelf.held()) == {"cat1", "dog2"}


def test_what_is_in_use_stays_and_the_longest_unused_goes(four):
    for holder, name in enumerate(("a1", "b1", "c1", "d1")):
        four.ask(holder, name)
        four.take(holder, name)
    four.ask(9, "e1")
    time_is_given = time.monotonic() + 0.1
    until(lambda: time.monotonic() > time_is_given or four.shelf.hold(9))
    assert not four.shelf.hold(9)
    four.shelf.release(2)
    four.shelf.release(1)
    assert four.take(9, "e1") == [("e1", 0)]
    assert "b1" not in four.shelf.held()  # taken before c1
    assert {"a1", "c1", "d1"} < set(four.shelf.held())


def test_a_new_version_of_a_file_is_read_anew(four):
    for holder in (1, 2):
        use = LoraUse("cat1", 1.0, version=str(holder))
        four.shelf.check([use])
        four.shelf.want(holder, [use])
        until(partial(four.shelf.hold, holder))
    assert four.files.read_names == ["cat1", "cat1"]


def test_the_first_of_those_that_wait_gets_what_it_needs_whatever_others_want(four):
    four.ask(1, "big3")
    four.take(1, "big3")
    four.ask(2, "x4")  # needs everything
    four.ask(3, "y1")  # read ahead into the page that is free, and put out again for the first
    until(lambda: not four.shelf.hold(2) and "y1" in four.shelf.held())
    four.shelf.release(1)
    assert [name for name, _ in four.take(2, "x4")] == ["x4"] * 4
    assert not four.shelf.hold(3)
    four.shelf.release(2)
    assert four.take(3, "y1") == [("y1", 0)]


def test_who_comes_before_takes_what_the_one_behind_had_gathered(four):
    four.ask(1, "a2")
    four.take(1, "a2")
    four.ask(2, "b2", "c2")
    until(lambda: not four.shelf.hold(2) and "b2" in four.shelf.held())
    four.ask(3, "d2")  # of a higher priority
    assert four.take(3, "d2") == [("d2", 0), ("d2", 1)]
    four.shelf.release(3)
    four.shelf.release(1)
    assert len(four.take(2, "b2", "c2")) == 4


def test_a_file_that_cannot_be_read_fails_who_asked_and_is_tried_again_for_the_next(four):
    four.files.failing["cat1"] = ConfigurationError("cat1 is damaged")
    four.ask(1, "cat1")
    until(lambda: four.shelf.hold(1))
    with pytest.raises(ConfigurationError, match="damaged"):
        four.shelf.pages(1, [LoraUse("cat1", 1.0)])
    four.shelf.release(1)
    four.files.failing["cat1"] = RuntimeError("a bug")
    four.ask(2, "cat1")
    until(lambda: four.shelf.hold(2))
    with pytest.raises(StageFailed, match="a bug"):
        four.shelf.pages(2, [LoraUse("cat1", 1.0)])
    four.shelf.release(2)
    four.files.failing.clear()
    four.ask(3, "cat1", "b3")
    assert len(four.take(3, "cat1", "b3")) == 4


def test_what_can_never_be_held_is_refused(four):
    with pytest.raises(InvalidRequest, match="no such file"):
        four.ask(1, "absent1")
    with pytest.raises(InvalidRequest, match="80 ranks") as raised:
        four.ask(1, "a3", "b2")
    assert raised.value.field == "loras"
    assert raised.value.allowed == "at most 64 ranks (lora.ranks)"


def test_a_file_that_is_named_twice_is_held_once_and_stops_nobody(four):
    four.ask(1, "a2", "a2")
    four.ask(2, "b2")
    assert four.take(1, "a2", "a2") == [("a2", 0), ("a2", 1)] * 2
    assert four.take(2, "b2") == [("b2", 0), ("b2", 1)]


def test_who_gives_up_while_a_file_is_read_leaves_nothing_behind(four):
    four.files.gate.clear()
    four.ask(1, "a4")
    assert not four.shelf.hold(1)
    four.shelf.release(1)
    four.files.gate.set()
    four.ask(2, "b4")
    assert [name for name, _ in four.take(2, "b4")] == ["b4"] * 4
