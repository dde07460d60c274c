"""Whether a node can go: what is counted, what is refused, and in which words."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.drain_plan import Deployed, Node, emptied_stages, found_nodes, moves
from serve.__main__ import main
from serve.commands.drain import chosen_node, refusal
from serve.errors import InvalidRequest

HEAD = Node("aa" * 28, "10.0.0.1", "head", is_head=True, free={"CPU": 4.0})
HERE = Node("ab" * 28, "10.0.0.2", "gpu-1", free={"CPU": 0.0})
OTHER = Node("ba" * 28, "10.0.0.3", "gpu-2", free={"CPU": 8.0, "GPU": 1.0})
NODES = (HEAD, HERE, OTHER)


def denoisers(*nodes: Node, name: str = "denoiser", gpus: float = 1.0) -> Deployed:
    return Deployed(name, "denoise", {"GPU": gpus, "CPU": 1.0}, tuple(node.id for node in nodes))


def test_a_stage_that_nobody_else_has_and_nobody_can_take_is_refused_with_the_arithmetic() -> None:
    running = [denoisers(HERE, HERE)]
    planned = moves(HERE.id, running, [HEAD])
    emptied = emptied_stages(planned, HERE.id, running)
    assert list(emptied) == ["denoise"]
    said = refusal(HERE, emptied).message
    assert "2 here, 0 elsewhere, room for 0 more elsewhere at 1 CPU, 1 GPU each" in said


def test_room_for_one_of_two_is_enough_for_the_stage() -> None:
    running = [denoisers(HERE, HERE)]
    planned = moves(HERE.id, running, [HEAD, OTHER])
    assert [move.room for move in planned] == [1]
    assert emptied_stages(planned, HERE.id, running) == {}


def test_another_pool_of_the_stage_stands_in() -> None:
    running = [denoisers(HERE), denoisers(OTHER, name="denoiser-l4")]
    planned = moves(HERE.id, running, [HEAD])
    assert [move.room for move in planned] == [0]
    assert emptied_stages(planned, HERE.id, running) == {}


def test_room_is_given_once() -> None:
    running = [denoisers(HERE), denoisers(HERE, name="decoder", gpus=0.5)]
    planned = moves(HERE.id, running, [OTHER])
    assert {move.name: move.room for move in planned} == {"denoiser": 1, "decoder": 0}


@pytest.mark.parametrize(
    ("selector", "room"),
    [
        ({}, 1),
        ({"market": "spot"}, 1),
        ({"market": "!spot"}, 0),
        ({"market": "in(spot, reserved)"}, 1),
        ({"market": "!in(spot,reserved)"}, 0),
        ({"market": "reserved"}, 0),
        ({"market": "!reserved"}, 1),
        ({"zone": "b"}, 0),
        ({"zone": "!b"}, 1),
        ({"market": "spot", "zone": "in(a, b)"}, 0),
    ],
)
def test_room_is_where_the_labels_are_that_a_pool_wants(
    selector: dict[str, str], room: int
) -> None:
    running = [replace(denoisers(HERE), selector=selector)]
    (move,) = moves(HERE.id, running, [replace(OTHER, labels={"market": "spot"})])
    assert move.room == room
    assert all(f"{label} {value}" in move.in_words() for label, value in selector.items())


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.floats(0.1, 3)), max_size=5),
    st.lists(st.floats(0, 8), max_size=4),
)
def test_no_more_room_is_given_than_there_is(
    pools: list[tuple[int, int, float]], free: list[float]
) -> None:
    others = [Node(f"{index:056x}", "", "", free={"CPU": cpus}) for index, cpus in enumerate(free)]
    running = [
        Deployed(f"pool-{index}", f"stage-{index}", {"CPU": each}, (HERE.id,) * here)
        for index, (here, _, each) in enumerate(pools)
    ]
    planned = moves(HERE.id, running, others)
    assert sum(move.room * move.needs["CPU"] for move in planned) <= sum(free) + 1e-3
    assert all(0 <= move.room <= move.here for move in planned)
    emptied = emptied_stages(planned, HERE.id, running)
    assert set(emptied) == {move.stage for move in planned if move.room == 0}


@pytest.mark.parametrize("wanted", [HERE.id, HERE.id[:6], HERE.address, HERE.hostname])
def test_a_node_is_found_by_what_people_know(wanted: str) -> None:
    assert chosen_node(wanted, NODES) == HERE


@pytest.mark.parametrize("wanted", ["", "ab", "nobody", HEAD.hostname])
def test_a_node_that_is_not_meant_clearly_or_is_the_head_is_refused(wanted: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        chosen_node(wanted, NODES)
    assert refused.value.field == "node"
    assert OTHER.address in str(refused.value.allowed)


def test_one_address_of_two_nodes_means_neither() -> None:
    twin = Node("cd" * 28, HERE.address, "gpu-1b")
    assert len(found_nodes(HERE.address, [*NODES, twin])) == 2
    with pytest.raises(InvalidRequest):
        chosen_node(HERE.address, [*NODES, twin])


@pytest.mark.parametrize("option", [("--deadline", "-1"), ("--wait", "soon")])
def test_bad_times_are_named_before_ray_is_asked(
    capsys: pytest.CaptureFixture[str], option: tuple[str, str]
) -> None:
    assert main(("drain", "gpu-1", *option, "--json")) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["field"] == option[0].removeprefix("--")
