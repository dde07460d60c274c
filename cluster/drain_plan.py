"""Whether a node can go: what runs there, what runs elsewhere, and what there is room for.

A replica that is asked to go is replaced first, so room counts while the old one still holds its
own. Pure: whoever asks says what there is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster.

    Attributes:
        id: Hexadecimal.
        address: Its IP address.
        hostname: Its own name.
        is_head: Ray's state lives there.
        free: Resource -> how much of it nobody has reserved.
        labels: That it has.
    """

    id: str
    address: str
    hostname: str
    is_head: bool = False
    free: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Deployed:
    """Replicas of one kind.

    Attributes:
        name: Of the pool.
        stage: What it does; pools of one stage stand in for one another.
        needs: Resource -> how much of it a replica reserves.
        nodes: Id of the node of each replica that serves.
        selector: Label -> what a node must have of it, in Ray's words.
    """

    name: str
    stage: str
    needs: Mapping[str, float]
    nodes: tuple[str, ...]
    selector: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Move:
    """What a drain means for one pool: `here` replicas go, `room` of them fit elsewhere now."""

    name: str
    stage: str
    here: int
    elsewhere: int
    room: int
    needs: Mapping[str, float]
    selector: Mapping[str, str] = field(default_factory=dict)

    def in_words(self) -> str:
        """Say it with its arithmetic."""
        each = ", ".join(f"{amount:g} {name}" for name, amount in sorted(self.needs.items()))
        where = ", ".join(f"{label} {value}" for label, value in sorted(self.selector.items()))
        return (
            f"{self.name} ({self.stage}): {self.here} here, {self.elsewhere} elsewhere, room for "
            f"{self.room} more elsewhere at {each or 'no resources'} each"
            + (f" where {where}" if where else "")
        )


def found_nodes(wanted: str, nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes that an id, the beginning of one, an address or a hostname may mean."""
    exact = [node for node in nodes if wanted in (node.id, node.address, node.hostname)]
    begun = [node for node in nodes if len(wanted) >= 4 and node.id.startswith(wanted.lower())]
    return exact or begun


def moves(node_id: str, deployed: Sequence[Deployed], others: Sequence[Node]) -> list[Move]:
    """Return what goes, largest needs first, as they are given room: first fit.

    Args:
        node_id: Of the node that is to go.
        deployed: All that runs.
        others: Nodes that stay and take replicas.
    """
    free = {node.id: dict(node.free) for node in others}
    staying = {node.id for node in others}
    found = []
    for each in sorted(deployed, key=lambda one: (-sum(one.needs.values()), one.name)):
        here = each.nodes.count(node_id)
        if here:
            may = [free[node.id] for node in others if has_labels(node.labels, each.selector)]
            room = sum(_takes(each.needs, may) for _ in range(here))
            elsewhere = sum(node in staying for node in each.nodes)
            found.append(
                Move(each.name, each.stage, here, elsewhere, room, each.needs, each.selector)
            )
    return found


def emptied_stages(
    planned: Sequence[Move], node_id: str, deployed: Sequence[Deployed]
) -> dict[str, list[Move]]:
    """Return each stage that would be left without any replica, and what goes of it."""
    room = {(move.stage, move.name): move.room for move in planned}
    left: dict[str, int] = {}
    for each in deployed:
        stays = sum(node != node_id for node in each.nodes)
        left[each.stage] = left.get(each.stage, 0) + stays + room.get((each.stage, each.name), 0)
    return {
        stage: [move for move in planned if move.stage == stage]
        for stage in dict.fromkeys(move.stage for move in planned)
        if left[stage] == 0
    }


def has_labels(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Return whether a node is one that a selector means.

    As Ray does (its docs, "Use labels to control scheduling"): `spot`, `!spot`, `in(a, b)` and
    `!in(a, b)`; a node without the label has no value, which is none of those.
    """
    return all(
        (labels.get(label) in _values(condition)) != condition.startswith("!")
        for label, condition in selector.items()
    )


def _values(condition: str) -> set[str]:
    plain = condition.removeprefix("!")
    several = re.fullmatch(r"in\((.*)\)", plain)
    return {value.strip() for value in several[1].split(",")} if several else {plain}


def _takes(needs: Mapping[str, float], free: Sequence[dict[str, float]]) -> bool:
    """Reserve one replica's needs on the first node that has them."""
    for node in free:
        if all(node.get(name, 0.0) >= amount - 1e-6 for name, amount in needs.items()):
            for name, amount in needs.items():
                if amount:
                    node[name] -= amount
            return True
    return False
