"""Whether a part has the tensors that its configuration asks for: names, shapes, dtypes, scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from serve.checkpoints.architecture import expected_shapes
from serve.checkpoints.part import INPUT_SCALE, SCALE, Part
from serve.errors import ConfigurationError

_ORDINARY = ("F32", "F16", "BF16")
_FP8 = ("F8_E4M3", "F8_E5M2")
READABLE = (*_ORDINARY, *_FP8)
_MOST_NAMED = 10
_T5_ALIASES = ("shared.weight", "encoder.embed_tokens.weight")


def check_part(part: Part, config: Mapping[str, Any]) -> None:
    """Check headers alone.

    Raises:
        ConfigurationError: Tensors are missing or too many (at most ten are named, with the count),
            one has another shape or a dtype that is not read, or a scale has no place, no
            FP8 weight or another shape.
    """
    assert part.kind is not None
    expected = expected_shapes(part.kind, config)
    if part.kind == "t5":
        _name_embedding(part, expected)
    found = part.weights
    if missing := sorted(set(expected) - set(found)):
        raise misfit(part, f"{part.files.paths[0]} lacks {listed(missing)}", missing[0])
    if strangers := sorted(set(found) - set(expected) - set(_T5_ALIASES)):
        what = f"{part.file_of(strangers[0])} holds {listed(strangers)} that have no place"
        raise misfit(part, what + f" in {part.kind}", strangers[0])
    for name, shape in expected.items():
        source = found[name]
        if source.shape != shape:
            raise misfit(
                part,
                f"Tensor {_both(part, name)} has shape {list(source.shape)};"
                f" the other tensors ask for {list(shape)}",
                name,
            )
        if source.dtype not in READABLE:
            raise misfit(
                part,
                f"Tensor {_both(part, name)} has dtype {source.dtype};"
                f" expected one of {', '.join(READABLE)}",
                name,
            )
    for name in part.sources:
        for end in (SCALE, INPUT_SCALE):
            if name.endswith(end) and name.removesuffix(end) + ".weight" not in expected:
                raise misfit(part, f"Tensor {_both(part, name)} scales no tensor", name)
        if name.endswith(SCALE):
            _check_scale(part, name)


def listed(names: Sequence[str]) -> str:
    """Return at most ten names, and how many there are."""
    shown = ", ".join(repr(name) for name in names[:_MOST_NAMED])
    if len(names) == 1:
        return f"tensor {shown}"
    rest = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{len(names)} tensors: {shown}{rest}"


def misfit(part: Part, message: str, name: str) -> ConfigurationError:
    """Return the error for a part that does not fit."""
    return ConfigurationError(
        message + ".", field="model.path", value=name, allowed=f"SD3.5's own {part.kind or 'parts'}"
    )


def _check_scale(part: Part, name: str) -> None:
    scale, weight = part.sources[name], part.sources[name.removesuffix(SCALE) + ".weight"]
    rows = weight.shape[0] if weight.shape else 1
    if weight.dtype not in _FP8:
        what = f"scales a weight in {weight.dtype}; expected {' or '.join(_FP8)}"
    elif prod(scale.shape) not in (1, rows):
        what = f"has shape {list(scale.shape)}; expected one value or [{rows}]"
    elif scale.dtype not in _ORDINARY:
        what = f"has dtype {scale.dtype}; expected one of {', '.join(_ORDINARY)}"
    else:
        return
    raise misfit(part, f"Tensor {_both(part, name)} {what}", name)


def _both(part: Part, name: str) -> str:
    stored = part.sources[name].stored
    own = "" if stored in (None, name) else f" (stored as {stored!r})"
    return f"{name!r}{own} in {part.file_of(name)}"


def _name_embedding(part: Part, expected: dict[str, tuple[int, ...]]) -> None:
    """T5's embedding may be stored under either of its names, or both."""
    first, second = _T5_ALIASES
    if first not in part.sources and second in part.sources:
        expected[second] = expected.pop(first)
