"""A workflow in ComfyUI's API format, checked as ComfyUI checks it (`execution.validate_prompt`).

Error types, messages and shapes are its own, so that clients show them as they always did. Outputs
that fail are left out, and the prompt goes on with the others, if there are any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from serve.http.comfyui_errors import PromptError
from serve.http.comfyui_nodes import NODES, Catalogue, Input, is_known, shown_config
from serve.lora_choice import SUFFIX

MOST_NODES = 2000
_LONGEST_SHOWN = 200
_LONGEST_NUMBER_SHOWN = 40
_LONGEST_LIST_SHOWN = 20


class NodeError(Exception):
    """A node cannot be taken: an entry of ComfyUI's `node_errors`.

    Attributes:
        node: Its id.
        error: ComfyUI's error object.
    """

    def __init__(self, node: str, kind: str, message: str, details: str = "", **extra: Any) -> None:
        super().__init__(message)
        self.node = node
        self.error = {"type": kind, "message": message, "details": details, "extra_info": extra}


def not_yet(node: str, what: str, remedy: str, **extra: Any) -> NodeError:
    """Return the error for what ComfyUI does and Kelvin does not do yet."""
    return NodeError(
        node, "not_supported_yet", f"{what}: not supported yet", remedy, allowed=remedy, **extra
    )


@dataclass(frozen=True)
class Link:
    """An input that takes another node's output."""

    node: str
    slot: int


@dataclass(frozen=True)
class Node:
    """One node; its inputs are converted as ComfyUI converts them."""

    id: str
    class_type: str
    inputs: Mapping[str, Any]


@dataclass
class Graph:
    """A checked workflow.

    Attributes:
        nodes: Those that outputs depend on and that have no errors, by id.
        outputs: Ids of output nodes that can be made.
        node_errors: As ComfyUI tells them.
    """

    nodes: dict[str, Node] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    node_errors: dict[str, Any] = field(default_factory=dict)

    def refuse(self, output: str, errors: Mapping[str, list[dict[str, Any]]], types: Any) -> None:
        """Leave an output out and say why.

        Args:
            output: Its id.
            errors: Node id -> its errors.
            types: Node id -> class_type.
        """
        if output in self.outputs:
            self.outputs.remove(output)
        for node, reasons in errors.items():
            told = self.node_errors.setdefault(
                node, {"errors": reasons, "dependent_outputs": [], "class_type": types[node]}
            )
            if output not in told["dependent_outputs"]:
                told["dependent_outputs"].append(output)

    def failed(self) -> PromptError:
        """Return the error for a prompt of which no output can be made."""
        lines = [
            f"{error['message']}: {error['details']}"
            for told in self.node_errors.values()
            for error in told["errors"]
        ]
        return PromptError(
            "prompt_outputs_failed_validation",
            "Prompt outputs failed validation",
            "\n".join(lines),
            self.node_errors,
        )


def named(prompt: Any, *names: str) -> list[str]:
    """Return the texts that a workflow's nodes have in inputs of these names, checked or not."""
    nodes = prompt.values() if isinstance(prompt, dict) and len(prompt) <= MOST_NODES else ()
    inputs = [node.get("inputs") for node in nodes if isinstance(node, dict)]
    found = [each.get(name) for each in inputs if isinstance(each, dict) for name in names]
    return list(dict.fromkeys(each for each in found if isinstance(each, str)))


def checked_graph(prompt: Any, catalogue: Catalogue) -> Graph:
    """Check a workflow.

    Args:
        prompt: Node id -> node, as JSON gave it.
        catalogue: What files there are.

    Returns:
        The graph; `outputs` is empty where none can be made.

    Raises:
        PromptError: It is no workflow, names unknown nodes, or has no outputs.
    """
    raw = _checked_nodes(prompt)
    outputs = [node for node, each in raw.items() if _is_output(each["class_type"])]
    if not outputs:
        raise PromptError("prompt_no_outputs", "Prompt has no outputs")
    graph = Graph(outputs=list(outputs))
    checked = {node: _Checked(node, each, raw, catalogue) for node, each in raw.items()}
    types = {node: each["class_type"] for node, each in raw.items()}
    for output in outputs:
        upstream = list(_upstream(output, checked))
        errors = {node: checked[node].errors for node in upstream if checked[node].errors}
        if errors:
            graph.refuse(output, errors, types)
        else:
            graph.nodes |= {node: checked[node].node for node in upstream}
    return graph


def _checked_nodes(prompt: Any) -> dict[str, Any]:
    if not isinstance(prompt, dict) or not prompt:
        raise PromptError("invalid_prompt", "The prompt is no object of nodes", _API_FORMAT)
    if isinstance(prompt.get("nodes"), list):
        raise PromptError(
            "invalid_prompt", "This is a workflow in the page's own format", _API_FORMAT
        )
    if len(prompt) > MOST_NODES:
        raise PromptError(
            "invalid_prompt", f"The prompt has {len(prompt)} nodes", f"at most {MOST_NODES}"
        )
    unknown: dict[str, str] = {}
    for node, each in prompt.items():
        class_type = each.get("class_type") if isinstance(each, dict) else None
        if not isinstance(class_type, str) or not isinstance(each.get("inputs", {}), dict):
            raise PromptError(
                "invalid_prompt",
                "Cannot execute because a node is missing the class_type property.",
                f"Node ID '#{_shown(node)}'",
            )
        if class_type not in NODES and not is_known(class_type):
            unknown[node] = class_type
    if unknown:
        node, class_type = next(iter(unknown.items()))
        names = sorted({_shown(each) for each in unknown.values()})[:_LONGEST_LIST_SHOWN]
        raise PromptError(
            "missing_node_type",
            f"Cannot execute because node {_shown(class_type)} does not exist.",
            f"Node ID '#{_shown(node)}'; unknown here: {', '.join(names)}",
            node_id=_shown(node),
            class_type=_shown(class_type),
            unknown=names,
            allowed="the nodes that /object_info lists",
        )
    return prompt


_API_FORMAT = "export it by 'Save (API Format)' or 'Export (API)': {id: {class_type, inputs}}"


def _is_output(class_type: str) -> bool:
    node = NODES.get(class_type)
    return node is not None and node.is_output


def _upstream(output: str, checked: Mapping[str, _Checked]) -> Iterator[str]:
    """Yield an output and all that it depends on, each once."""
    waiting, seen = [output], {output}
    while waiting:
        node = waiting.pop()
        yield node
        for link in checked[node].links:
            if link not in seen:
                seen.add(link)
                waiting.append(link)


class _Checked:
    """One node's inputs, checked; what they link to is not.

    Attributes:
        links: Ids of the nodes that it depends on, as far as they are there.
    """

    def __init__(self, node: str, raw: Any, all_raw: Any, catalogue: Catalogue) -> None:
        self._id = node
        self._all = all_raw
        self._catalogue = catalogue
        self._class_type: str = raw["class_type"]
        self._raw: dict[str, Any] = raw.get("inputs", {})
        self._values: dict[str, Any] = {}
        self.errors: list[dict[str, Any]] = []
        self.links: list[str] = []
        kind = NODES.get(self._class_type)
        if kind is None:
            error = not_yet(
                node,
                f"Node {_shown(self._class_type)}",
                "a workflow without it; /object_info lists the nodes that there are",
                class_type=_shown(self._class_type),
            )
            self.errors.append(error.error)
            return
        for name, source in kind.inputs.items():
            if name in self._raw:
                self._check(name, source, self._raw[name])
            elif source.required:
                self._error(name, "required_input_missing", "Required input is missing", name)

    @property
    def node(self) -> Node:
        """The node, if it has no errors."""
        return Node(self._id, self._class_type, self._values)

    def _check(self, name: str, source: Input, value: Any) -> None:
        if isinstance(value, list):
            self._check_link(name, source, value)
            return
        if source.kind not in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
            self._invalid(name, source, value, "a link to another node is needed")
            return
        try:
            converted = _converted(source.kind, value)
        except (ValueError, TypeError, OverflowError) as error:
            self._invalid(name, source, value, str(error))
            return
        least, most = source.options.get("min"), source.options.get("max")
        if least is not None and converted < least:
            message = f"Value {converted} smaller than min of {least}"
            self._error(name, "value_smaller_than_min", message, name, source, value)
        elif most is not None and converted > most:
            message = f"Value {_shown(converted)} bigger than max of {most}"
            self._error(name, "value_bigger_than_max", message, name, source, value)
        elif source.kind == "COMBO":
            self._choose(name, source, value)
        else:
            self._values[name] = converted

    def _choose(self, name: str, source: Input, value: Any) -> None:
        if source.choices == "images":
            if isinstance(value, str) and value in self._catalogue.images:
                self._values[name] = value
            else:
                # nodes.py, LoadImage.VALIDATE_INPUTS.
                details = f"{name} - Invalid image file: {_shown(value)}"
                message = "Custom validation failed for node"
                self._error(name, "custom_validation_failed", message, details, None, value)
            return
        choices = self._catalogue.choices(source)
        chosen = chosen_of(value, choices, is_file=isinstance(source.choices, str))
        if chosen is not None:
            self._values[name] = chosen
            return
        is_long = len(choices) > _LONGEST_LIST_SHOWN
        listed = f"(list of length {len(choices)})" if is_long else str(list(choices))
        details = f"{name}: '{_shown(value)}' not in {listed}"
        shown = None if is_long else source
        self._error(name, "value_not_in_list", "Value not in list", details, shown, value)

    def _check_link(self, name: str, source: Input, value: list[Any]) -> None:
        if (
            len(value) != 2
            or not isinstance(value[0], str | int)
            or not isinstance(value[1], int)
            or isinstance(value[0], bool)
        ):
            message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            self._error(name, "bad_linked_input", message, name, source, value)
            return
        link = Link(str(value[0]), value[1])
        if link.node not in self._all:
            message = f"Bad linked input, there is no node {_shown(link.node)}"
            self._error(name, "bad_linked_input", message, name, source, value)
            return
        kind = NODES.get(self._all[link.node]["class_type"])
        if kind is not None:
            if not 0 <= link.slot < len(kind.outputs):
                message = f"Bad linked input, {kind.name} has no output {_shown(link.slot)}"
                self._error(name, "bad_linked_input", message, name, source, value)
                return
            received = kind.outputs[link.slot]
            if received != source.kind and (received, source.kind) != ("STRING", "COMBO"):
                self.errors.append(
                    {
                        "type": "return_type_mismatch",
                        "message": "Return type mismatch between linked nodes",
                        "details": f"{name}, received_type({received}) mismatch"
                        f" input_type({source.kind})",
                        "extra_info": {
                            "input_name": name,
                            "input_config": shown_config(source, self._catalogue),
                            "received_type": received,
                            "linked_node": [link.node, link.slot],
                        },
                    }
                )
                return
        self._values[name] = link
        self.links.append(link.node)

    def _invalid(self, name: str, source: Input, value: Any, why: str) -> None:
        message = f"Failed to convert an input value to a {source.kind} value"
        details = f"{name}, {_shown(value)}, {_shown(why)}"
        self._error(name, "invalid_input_type", message, details, source, value)
        self.errors[-1]["extra_info"]["exception_message"] = _shown(why)

    def _error(
        self,
        name: str,
        kind: str,
        message: str,
        details: str,
        source: Input | None = None,
        value: Any = None,
    ) -> None:
        extra: dict[str, Any] = {"input_name": name}
        if source is not None:
            extra["input_config"] = shown_config(source, self._catalogue)
        if kind != "required_input_missing":
            extra["received_value"] = value if isinstance(value, bool) else _shown_value(value)
        self.errors.append(
            {"type": kind, "message": message, "details": details, "extra_info": extra}
        )


def chosen_of(value: Any, choices: tuple[str, ...], *, is_file: bool) -> str | None:
    """Return the choice that a value means; None: there is no such.

    Files are found in other folders and in another case as well: where they lie is the business of
    whoever wrote the workflow.
    """
    if not isinstance(value, str):
        return None
    if value in choices:
        return value
    if not is_file:
        return None
    wanted = _file_name(value)
    return next((each for each in choices if _file_name(each) == wanted), None)


def _file_name(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name.lower().removesuffix(SUFFIX)


def _converted(kind: str, value: Any) -> Any:
    if kind == "INT":
        return int(value)
    if kind == "FLOAT":
        number = float(value)
        if not math.isfinite(number):
            raise ValueError("not a finite number")
        return number
    if kind == "BOOLEAN":
        return bool(value)
    if kind == "STRING":
        if isinstance(value, dict):
            raise TypeError("an object is no text")
        return str(value)
    return value


def _shown_value(value: Any) -> Any:
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return value if is_number and len(_shown(value)) < _LONGEST_NUMBER_SHOWN else _shown(value)


def _shown(value: Any) -> str:
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, too deep a list
        return f"a {type(value).__name__}"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"
