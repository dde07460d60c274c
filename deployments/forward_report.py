"""What a denoiser says of its forwards in `/v1/status`: milliseconds, path and attention of each.

And a decoder of the sizes that it prepared.

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


class PreparedSize(Protocol):
    """What is read of a size; `deployments.sd3.compiled_decode.Prepared` is one."""

    @property
    def reason(self) -> str:
        """`compiled`, or why not."""

    @property
    def plain_ms(self) -> float | None:
        """Of decoding that is not compiled."""

    @property
    def compiled_ms(self) -> float | None:
        """Of decoding that is."""


def report_decoding(prepared: Mapping[tuple[int, ...], PreparedSize]) -> dict[str, Any]:
    """Return the fields `measured_ms` and `path` of a decoder's `ReplicaStatus`.

    Args:
        prepared: Shape of latents, [1, C, h, w] -> what became of preparing it.
    """
    measured: dict[str, float] = {}
    path: dict[str, str] = {}
    for (*_, height, width), size in prepared.items():
        label = f"{width * LATENT_PIXELS}x{height * LATENT_PIXELS}"
        path[label] = size.reason
        for name, ms in (("plain", size.plain_ms), ("compiled", size.compiled_ms)):
            if ms is not None:
                measured[f"{label} {name}"] = round(ms, 3)
    return {"measured_ms": measured, "path": path}


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
