"""Do pictures of the built-in model, made under load, show what was asked? Looked at after the run.

Afterwards, so that looking takes no time from the generator or from a service on the same machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deployments.builtin.checker import check
from deployments.builtin.read import PromptError, read_claims
from loadtest.shares import wilson_interval

MOST_JUDGED = 100


def judge(pictures: Iterable[tuple[str, Path]]) -> dict[str, Any]:
    """Return how many pictures show what their prompts state.

    Args:
        pictures: Prompt and file of each; those whose prompt states nothing that the checker knows
            are left out, and so are those beyond `MOST_JUDGED`.

    Returns:
        `judged`, `right`, `share`, its 95 % interval `from` and `to`, and `verdicts`: file name ->
        whether all is right. Of none judged, only that.
    """
    verdicts: dict[str, bool] = {}
    for prompt, file in pictures:
        if len(verdicts) == MOST_JUDGED:
            break
        try:
            claims = read_claims(prompt)
        except PromptError:
            continue
        with Image.open(file) as picture:
            verdicts[file.name] = check(np.asarray(picture.convert("RGB")), claims).all_right
    if not verdicts:
        return {"judged": 0}
    right, judged = sum(verdicts.values()), len(verdicts)
    low, high = wilson_interval(right, judged)
    return {
        "judged": judged,
        "right": right,
        "share": round(right / judged, 3),
        "from": round(low, 3),
        "to": round(high, 3),
        "verdicts": verdicts,
    }
