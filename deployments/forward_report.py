"""What a denoiser says of its forwards in `/v1/status`: milliseconds, path and attention of each.

Pure words and figures: nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypedDict

LATENT_PIXELS = 8  # of a picture, along a side of a latent


class DescribedModel(Protocol):
    """What is asked of a model; `deployments.sd3.mmdit.Mmdit` is one."""

    def path(self, height: int, width: int, text_tokens: int, rows: int) -> str:
        """Return how rows of this kind run; sides of the latents."""

    def attention_backend(self, height: int, width: int, text_tokens: int, rows: int) -> str:
        """Return the name of the attention that computes them."""


class ForwardReport(TypedDict):
    """Fields of `ReplicaStatus`; keys such as `1024x1024 x2 rows`."""

    measured_ms: dict[str, float]
    path: dict[str, str]
    attention: dict[str, str]


def report_forwards(costs: Mapping[str, Any], model: DescribedModel) -> ForwardReport:
    """Describe every kind of forward that was measured.

    Args:
        costs: What `StepCosts.as_json` gives.
        model: Computes them.
    """
    entries = costs["costs"]
    text_lengths = {entry["text_tokens"] for entry in entries}
    report = ForwardReport(measured_ms={}, path={}, attention={})
    for entry in entries:
        bucket = entry["height"], entry["width"], entry["text_tokens"], entry["rows"]
        label = bucket_label(*bucket, name_text=len(text_lengths) > 1)
        report["measured_ms"][label] = round(entry["seconds"] * 1000, 3)
        report["path"][label] = model.path(*bucket)
        report["attention"][label] = model.attention_backend(*bucket)
    return report


def bucket_label(
    height: int, width: int, text_tokens: int, rows: int, *, name_text: bool = False
) -> str:
    """Name a kind of forward for people, by the picture's size: width x height.

    Args:
        height: Of the latents.
        width: Of the latents.
        text_tokens: Of a prompt's embedding.
        rows: Of the forward; a guided request takes two.
        name_text: Say the number of text tokens, where it differs between forwards.
    """
    size = f"{width * LATENT_PIXELS}x{height * LATENT_PIXELS}"
    text = f", {text_tokens} text tokens" if name_text else ""
    return f"{size} x{rows} row{'' if rows == 1 else 's'}{text}"
