"""The README's table of settings, from the settings themselves.

`python -m serve.commands.settings_table README.md` writes it between the README's two marks; a test
compares the two.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from serve.config import ModelEntry, ModelSettings, PoolSettings, Settings, StorageSettings
from serve.tenant_settings import NamedTenant

_BEGIN = "<!-- settings: python -m serve.commands.settings_table README.md -->"
_END = "<!-- /settings -->"
_STAGES = ("text_encoder", "denoiser", "vae_decoder")
_NAMES: dict[Any, str] = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    PoolSettings: "pool, as `denoiser`",
    StorageSettings: "as section `storage`",
    ModelSettings: "as section `model`",
    NamedTenant: "{name, and what a tenant has}",
}
_BOUNDS = ((Ge, ">= {.ge}"), (Gt, "> {.gt}"), (Le, "<= {.le}"), (Lt, "< {.lt}"))


def settings_table() -> str:
    """Return a Markdown table of every setting, its type, default and meaning."""
    rows = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        if name in _STAGES:
            continue
        rows += _rows(name, ModelEntry if name == "models" else field.annotation)
    rows += _rows("denoiser", PoolSettings)
    return "\n".join(rows)


def _rows(section: str, kind: Any) -> Iterator[str]:
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        raise TypeError(f"settings section {section} is no pydantic model")
    for name, field in kind.model_fields.items():
        if _is_section(field.annotation):
            yield from _rows(f"{section}.{name}", field.annotation)
            continue
        default = section.replace("_", "-") if field.is_required() else field.default
        if name == "model":
            default = None
        cells = (f"`{section}.{name}`", _type(field), _shown(default), field.description or "")
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _is_section(kind: Any) -> bool:
    """Whether a field is a section of its own, within another one."""
    return isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in _NAMES


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
    if get_origin(annotation) is Annotated:
        return _words(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_words(part) for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is tuple:
        parts = get_args(annotation)
        if parts[-1] is Ellipsis:
            return f"list of {_words(parts[0])}"
        return f"[{', '.join(map(_words, parts))}]"
    if get_origin(annotation) is dict:
        key, value = map(_words, get_args(annotation))
        return f"object of {key}: {value}"
    return _NAMES.get(annotation, str(annotation))


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    if default in ("", (), {}):
        return "empty"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def write_into(file: Path) -> None:
    """Replace what lies between the marks of a Markdown file."""
    before, begin, rest = file.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{file} lacks the marks {_BEGIN} and {_END}")
    text = f"{before}{begin}\n{settings_table()}\n{end}{after}"
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_into(Path(sys.argv[1]))
