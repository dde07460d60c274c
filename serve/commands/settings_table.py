"""The README's table of settings, from the settings themselves.

`python -m serve.commands.settings_table` prints it; a test compares it with the README.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from serve.config import PoolSettings, Settings

_STAGES = ("text_encoder", "denoiser", "vae_decoder")
_BOUNDS = ((Ge, ">= {.ge}"), (Gt, "> {.gt}"), (Le, "<= {.le}"), (Lt, "< {.lt}"))


def settings_table() -> str:
    """Return a Markdown table of every setting, its type, default and meaning."""
    rows = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        if name in _STAGES:
            continue
        rows += _rows(name, field.annotation)
    rows += _rows("denoiser", PoolSettings)
    return "\n".join(rows)


def _rows(section: str, kind: Any) -> Iterator[str]:
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        raise TypeError(f"settings section {section} is no pydantic model")
    for name, field in kind.model_fields.items():
        default = section.replace("_", "-") if field.is_required() else field.default
        cells = (f"`{section}.{name}`", _type(field), _shown(default), field.description or "")
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(field: FieldInfo) -> str:
    bounds = [
        template.format(limit)
        for kind, template in _BOUNDS
        for limit in field.metadata
        if isinstance(limit, kind)
    ]
    lengths = [
        str(getattr(limit, "min_length", None) or getattr(limit, "max_length", None))
        for limit in field.metadata
        if isinstance(limit, MinLen | MaxLen)
    ]
    if lengths:
        bounds.append("-".join(lengths) + " characters")
    return ", ".join([_words(field.annotation), *bounds])


def _words(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_words(part) for part in get_args(annotation) if part is not type(None))
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return names.get(annotation, str(annotation))


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    if default == "":
        return "empty"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


if __name__ == "__main__":
    print(settings_table())
