"""`kelvin drain`: judges whether a node can go, has it drained, and tells how far that is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from cluster.drain_plan import Move, Node, emptied_stages, found_nodes, moves
from serve.commands.output import (
    EXIT_FAILED,
    EXIT_OK,
    console,
    stdout_is_for_json,
    write_json,
)
from serve.errors import InvalidRequest

_POLL_S = 0.5


def drain(
    wanted: str, *, deadline_s: Any, wait_s: Any, force: bool, dry_run: bool, as_json: bool
) -> int:
    """Drain a node and wait until nothing of Serve's is left there; 1 if that takes too long.

    Raises:
        InvalidRequest: There is no such node, it cannot go, or a stage would be left without any
            replica.
        ConfigurationError: No Kelvin runs on this Ray, or Ray refuses.
    """
    _checked("deadline", deadline_s, may_be_absent=True)
    _checked("wait", wait_s)
    with stdout_is_for_json() as stdout:
        from serve.model_admin import ModelAdmin, join_ray
        from serve.node_drain import begin_drain, cluster_nodes, deployed, draining, replicas_on

        join_ray()
        settings = ModelAdmin().settings()
        nodes, gone = cluster_nodes(), draining()
        node = chosen_node(wanted, nodes)
        running = deployed(settings)
        others = [each for each in nodes if each.id != node.id and each.id not in gone]
        planned = moves(node.id, running, others)
        emptied = emptied_stages(planned, node.id, running)
        if emptied and not force:
            raise refusal(node, emptied)
        out = console()
        for move in planned:
            out.print(move.in_words(), soft_wrap=True, markup=False)
        began, left = time.monotonic(), replicas_on(node.id)
        told = {"node": node.id, "address": node.address, "hostname": node.hostname}
        told_moves = [{"pool": move.name, "here": move.here, "room": move.room} for move in planned]
        if not dry_run:
            begin_drain(node.id, deadline_s)
            deadline = began + wait_s
            with out.status("") as line:
                while (left := replicas_on(node.id)) and time.monotonic() < deadline:
                    line.update(f"{node.hostname} {node.id[:8]}: {left} replicas left")
                    time.sleep(_POLL_S)
        if as_json:
            body = {**told, "moves": told_moves, "left": left, "drains": not dry_run}
            write_json({**body, "seconds": round(time.monotonic() - began, 1)}, stdout)
        elif dry_run:
            out.print("Nothing was done (--dry-run).")
        elif left:
            out.print(f"Still {left} replicas there after {wait_s:g} s; it goes on draining.")
        else:
            out.print(f"Drained: {node.hostname} {node.id[:8]} may be stopped.")
    return EXIT_FAILED if left and not dry_run else EXIT_OK


def chosen_node(wanted: str, nodes: Sequence[Node]) -> Node:
    """Return the node that is meant.

    Raises:
        InvalidRequest: There is none, there are several, or it is the head.
    """
    found = found_nodes(wanted, nodes)
    known = ", ".join(f"{each.id[:12]} ({each.hostname}, {each.address})" for each in nodes)
    if len(found) != 1:
        raise InvalidRequest(
            f"{len(found) or 'No'} nodes are meant by {wanted!r}.",
            field="node",
            value=wanted,
            allowed=f"the id of one, its beginning, its address or hostname: {known}",
        )
    if found[0].is_head:
        raise InvalidRequest(
            "The head holds Ray's own state and cannot be drained.",
            field="node",
            value=wanted,
            allowed=f"another node of: {known}",
        )
    return found[0]


def refusal(node: Node, emptied: dict[str, list[Move]]) -> InvalidRequest:
    """Return the error for a node without which stages have no replica."""
    arithmetic = "; ".join(move.in_words() for stage in emptied.values() for move in stage)
    return InvalidRequest(
        f"Without this node stage {', '.join(emptied)} has no replica: {arithmetic}.",
        field="node",
        value=node.id,
        allowed="room elsewhere first (another node, fewer replicas), or --force, with which they "
        "serve there until there is room or --deadline is over",
    )


def _checked(field: str, seconds: Any, *, may_be_absent: bool = False) -> None:
    if seconds is None and may_be_absent:
        return
    if not isinstance(seconds, float | int) or not 0 <= seconds <= 1e6:
        raise InvalidRequest(
            f"Option {field} is no time.", field=field, value=seconds, allowed="0 to 1e6 seconds"
        )
