"""Kelvin beside its peers: the comparison run small, so that no card's minute finds a slip."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from loadtest import peers
from loadtest.denoise_arms import with_compiled_blocks
from loadtest.peer_pipelines import held_bytes
from loadtest.peers_on_a_card import ratios_of, targets_of
from loadtest.sd35 import random_transformer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another cost more than these models take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def figures(per_s: float, alone_s: float) -> dict[str, Any]:
    return {
        "pictures_per_s": {"median": per_s, "least": per_s, "most": per_s, "n": 1},
        "alone_s": {"median": alone_s, "least": alone_s, "most": alone_s, "n": 1},
    }


TINY = ["--gpu", "--device", "cpu", "--cells", "tiny-64", "--pictures", "2"]


@pytest.mark.slow
def test_the_compiled_arm_makes_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # What Inductor writes for a CPU takes minutes to compile and is not what is measured.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    out = tmp_path / "peers.json"
    arguments = [*TINY, "--arms", "compiled", "--rounds", "1", "--out", str(out)]
    assert peers.main(arguments) == 0
    assert json.loads(out.read_text())["tiny-64"]["compiled"]["pictures"] == 2


def test_compiled_blocks_take_as_many_sizes_of_batch_as_arms_bring(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = random_transformer("tiny", torch.device("cpu"), torch.float32)
    blocks = with_compiled_blocks(model).transformer_blocks
    width = model.config["caption_projection_dim"]
    for rows in range(1, 10):  # Dynamo's own limit is 8
        hidden, text = torch.randn(rows, 4, width), torch.randn(rows, 5, width)
        with torch.no_grad():
            came = blocks[0](hidden, text, torch.randn(rows, width))
        assert [each.shape[0] for each in came] == [rows, rows]


def test_weights_are_counted_whole_where_a_tensor_holds_others():
    plain = torch.nn.Linear(4, 8)
    held = torch.nn.Linear(4, 8, bias=False)
    halves = [torch.zeros(8, 4, dtype=torch.int8) for _ in range(2)]
    two: Any = TwoTensor
    held.weight = torch.nn.Parameter(two(*halves), requires_grad=False)
    both = torch.nn.ModuleList([plain, held])
    assert held_bytes(both) == (4 * 8 + 8) * 4 + 2 * 4 * 8


def test_sittings_gather_in_one_file(tmp_path: Path):
    out = tmp_path / "peers.json"
    for arm in ("kelvin", "tutorial"):
        arguments = [*TINY, "--arms", arm, "--rounds", "2", "--alone", "1", "--out", str(out)]
        assert peers.main(arguments) == 0
    report = json.loads(out.read_text())
    assert report["complete"]
    assert len(report["sittings"]) == 2
    cell = report["tiny-64"]
    assert {name: each["sitting"] for name, each in cell.items()} == {"kelvin": 0, "tutorial": 1}
    for found in cell.values():
        assert found["pictures"] == 4
        assert found["pictures_per_s"]["n"] == 2
        assert 0 < found["pictures_per_s"]["least"] <= found["pictures_per_s"]["most"]
        assert found["joules_per_picture"] is None  # a CPU tells none
    assert set(ratios_of(cell)) == {"tutorial"}


def test_an_arm_that_fails_says_why_and_the_others_go_on(tmp_path: Path):
    out = tmp_path / "peers.json"
    # torchao is not installed here, or refuses a CPU: either way it has to say so.
    arguments = [*TINY, "--arms", "torchao,kelvin", "--alone", "0", "--rounds", "1"]
    arguments += ["--out", str(out)]
    assert peers.main(arguments) == 1
    cell = json.loads(out.read_text())["tiny-64"]
    assert cell["torchao"]["failed"]
    assert cell["kelvin"]["pictures"] == 2


@pytest.mark.parametrize("text", ["", "# Read me", "[1]", '{"sittings": []}'])
def test_another_file_is_not_taken_for_an_earlier_sitting(tmp_path: Path, text: str):
    out = tmp_path / "mine"
    out.write_text(text)
    assert peers.main([*TINY, "--out", str(out)]) == 1
    assert out.read_text() == text


def test_targets_are_judged_where_both_were_measured():
    report = {
        "large-1024": {
            "tutorial": figures(0.18, 5.4),
            "compiled": figures(0.27, 3.8),
            "kelvin": figures(0.37, 2.7),
        },
        "medium-512": {"torchao": {"failed": "no torchao"}, "kelvin": figures(4.0, 0.3)},
    }
    targets = targets_of(report)
    assert set(targets) == {"large-1024, kelvin/tutorial", "large-1024, kelvin/compiled"}
    assert targets["large-1024, kelvin/tutorial"]["met"]
    assert not targets["large-1024, kelvin/compiled"]["met"]
    assert ratios_of(report["large-1024"])["tutorial"]["alone"] == pytest.approx(2.0)


def test_arms_are_compared_where_no_picture_was_asked_for_alone():
    arms = {name: figures(1.0, 0.0) | {"alone_s": None} for name in ("tutorial", "kelvin")}
    assert ratios_of(arms) == {"tutorial": {"pictures_per_s": 1.0}}


@pytest.mark.parametrize(
    "arguments", [["--gpu", "--cells", "huge-1"], ["--gpu", "--pictures", "7"]]
)
def test_what_cannot_work_is_refused_before_anything_is_built(arguments):
    with pytest.raises(SystemExit) as refused:
        peers.parse_arguments(arguments)
    assert refused.value.code == 2
