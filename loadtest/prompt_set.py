"""Prompts for load tests: the sets that are shipped, or a file of one's own, one prompt a line.

`scenes` are what the built-in model draws and its checker judges, `general` is what people ask a
text-to-image model for. Lines that begin with # are not prompts; there stands each file's licence.
"""

from __future__ import annotations

from pathlib import Path

from serve.errors import InvalidRequest
from serve.requests import LONGEST_PROMPT

_FOLDER = Path(__file__).parent / "prompts"
SCENES, GENERAL = "scenes", "general"
NAMES = (SCENES, GENERAL)
_BUILT_IN = ("kelvin-builtin", "builtin")


def is_built_in(model: str) -> bool:
    """Return whether this is the model that draws scenes, and nothing else."""
    return model in _BUILT_IN


def prompts_for(model: str) -> str:
    """Return the set that a model is asked for where none is named."""
    return SCENES if is_built_in(model) else GENERAL


def read_prompts(name: str) -> list[str]:
    """Return a set's prompts in the order of the file.

    Args:
        name: One of `NAMES`, or a file.

    Raises:
        InvalidRequest: There is no such set or file, or it has no prompts, or too long a one.
    """
    file = _FOLDER / f"{name}.txt" if name in NAMES else Path(name)
    try:
        # Not splitlines: a prompt may hold U+2028 and other ends of lines that editors do not show.
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InvalidRequest(
            f"The prompts cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}.",
            field="prompts",
            value=name,
            allowed=f"{' or '.join(NAMES)}, or a text file with a prompt a line",
        ) from None
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts or max(map(len, prompts)) > LONGEST_PROMPT:
        raise InvalidRequest(
            "The file has no prompts." if not prompts else "A prompt is too long.",
            field="prompts",
            value=name,
            allowed=f"a prompt a line, each of at most {LONGEST_PROMPT} characters",
        )
    return prompts
