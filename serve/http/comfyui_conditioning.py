"""What a chain's conditioning says: the prompt, and when which negative prompt holds.

ComfyUI averages all conditionings that hold at a step (`comfy/samplers.py`, calc_cond_batch). SD3's
makers use that to let the negative prompt hold for the first part of sampling and zeros after it;
this very shape is Kelvin's `negative_prompt_range`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from serve.http.comfyui_graph import Graph, Node, NodeError, not_yet

NEVER: Final = (1 - 2**-20, 1.0)
"""A share of sampling after every step's noise level, which is 1/1000 at least."""

_MOST_PARTS = 64
_NEGATIVE = (
    "one text, or one text by ConditioningSetTimestepRange with ConditioningZeroOut for the rest"
)
Value = Callable[[Node, str], Any]


@dataclass(frozen=True)
class _Part:
    """A conditioning that holds for a share of sampling.

    Attributes:
        text: The node that encodes it.
        is_zero: Whether it is zeros in that one's place.
        start: Of sampling, from 0.
        end: At most 1.
    """

    text: Node
    is_zero: bool = False
    start: float = 0.0
    end: float = 1.0


def positive_text(graph: Graph, sampler: Node) -> Node:
    """Return the node that encodes the prompt of a KSampler.

    Raises:
        NodeError: It is not one text for all of sampling.
    """
    node = graph.nodes[sampler.inputs["positive"].node]
    if node.class_type not in ("CLIPTextEncode", "CLIPTextEncodeSD3"):
        raise not_yet(
            node.id, f"{node.class_type} in the positive conditioning", "one CLIPTextEncode(SD3)"
        )
    return node


def negative_fields(
    graph: Graph, sampler: Node, value: Value
) -> tuple[Node | None, tuple[float, float] | None]:
    """Return the node that encodes the negative prompt, and the share of sampling it holds for.

    Args:
        graph: Checked.
        sampler: The KSampler.
        value: Returns a node's input.

    Returns:
        (None, NEVER) for zeros all the time, (node, None) for one text all the time.

    Raises:
        NodeError: It is of another shape.
    """
    root = graph.nodes[sampler.inputs["negative"].node]
    parts = _Parts(graph, value).of(root)
    texts = [part for part in parts if not part.is_zero]
    zeros = sorted((part.start, part.end) for part in parts if part.is_zero)
    if not texts and _is_all(zeros):
        return None, NEVER
    if len(texts) != 1:
        raise not_yet(root.id, f"{len(texts)} negative texts", _NEGATIVE)
    text = texts[0]
    held = (text.start, text.end)
    rest = [each for each in ((0.0, held[0]), (held[1], 1.0)) if each[0] < each[1]]
    if zeros != rest:
        raise not_yet(root.id, f"A negative prompt from {held[0]:g} to {held[1]:g}", _NEGATIVE)
    return text.text, None if not rest else held


def _is_all(spans: list[tuple[float, float]]) -> bool:
    reached = 0.0
    for start, end in spans:
        if start != reached:
            return False
        reached = end
    return reached == 1.0


class _Parts:
    """What the conditionings of one chain consist of; each node is looked at once."""

    def __init__(self, graph: Graph, value: Value) -> None:
        self._graph = graph
        self._value = value
        self._known: dict[str, list[_Part]] = {}

    def of(self, node: Node, seen: tuple[str, ...] = ()) -> list[_Part]:
        """Return the parts of a node's conditioning.

        Args:
            node: Which one.
            seen: Nodes that depend on it.

        Raises:
            NodeError: There are too many, or they go round in a circle.
        """
        if node.id in seen:
            raise NodeError(
                node.id, "dependency_cycle", "Dependency cycle detected", "conditioning"
            )
        if len(seen) > _MOST_PARTS:
            raise not_yet(node.id, f"More than {_MOST_PARTS} conditionings in a row", _NEGATIVE)
        if node.id not in self._known:
            parts = self._made(node, (*seen, node.id))
            if len(parts) > _MOST_PARTS:
                raise not_yet(node.id, f"More than {_MOST_PARTS} conditionings", _NEGATIVE)
            self._known[node.id] = parts
        return self._known[node.id]

    def _made(self, node: Node, seen: tuple[str, ...]) -> list[_Part]:
        if node.class_type in ("CLIPTextEncode", "CLIPTextEncodeSD3"):
            return [_Part(node)]
        links = [node.inputs[name] for name in node.inputs if name.startswith("conditioning")]
        parts = [part for link in links for part in self.of(self._graph.nodes[link.node], seen)]
        if node.class_type == "ConditioningZeroOut":
            return [replace(part, is_zero=True) for part in parts]
        if node.class_type == "ConditioningSetTimestepRange":
            # It sets the range anew: nodes.py, ConditioningSetTimestepRange.set_range.
            start, end = float(self._value(node, "start")), float(self._value(node, "end"))
            if start >= end:
                raise NodeError(
                    node.id,
                    "custom_validation_failed",
                    "Custom validation failed for node",
                    f"end - a range from {start:g} to {end:g} holds never; end is above start",
                    input_name="end",
                )
            return [replace(part, start=start, end=end) for part in parts]
        return parts
