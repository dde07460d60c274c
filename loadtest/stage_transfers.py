"""What lies between the stages: the time of a call that the replica did not spend on it.

A call's span is the Pipeline's, from the handle to the answer; the replica's, a child of it, is
from the call's arrival there to its end. Between the two are Serve's router, pickling, Ray's object
store and the way back.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from loadtest.otlp_receiver import ReceivedSpan

STAGES = ("text", "denoise", "decode")
_MS = 1e6  # nanoseconds
_MIB = 2**20


def since(begin_ns: int, spans: Sequence[ReceivedSpan]) -> list[ReceivedSpan]:
    """Return the spans that began then or later, by the clock of `time.time_ns`."""
    return [span for span in spans if span.began_ns >= begin_ns]


def has_all(spans: Sequence[ReceivedSpan], pictures: int) -> bool:
    """Return whether every stage's calls and their replicas' spans of so many pictures came."""
    names = [span.name for span in spans]
    return all(
        names.count(f"kelvin.{stage}{kind}") >= pictures
        for stage in STAGES
        for kind in ("", ".replica")
    )


def transfers(spans: Sequence[ReceivedSpan]) -> dict[str, dict[str, Any]]:
    """Return for each stage the median milliseconds of its calls, and of what was on the way.

    Args:
        spans: Of pictures that were made one after the other: calls that wait for one another in
            the router would count as on the way.
    """
    found: dict[str, dict[str, Any]] = {}
    by_id = {span.span_id: span for span in spans}
    for stage in STAGES:
        pairs = [
            (_ms(by_id[span.parent_id]), _ms(span))
            for span in spans
            if span.name == f"kelvin.{stage}.replica" and span.parent_id in by_id
        ]
        if pairs:
            between = [call - replica for call, replica in pairs]
            found[stage] = {
                "calls": len(pairs),
                "call_ms": round(statistics.median(call for call, _ in pairs), 2),
                "transfer_ms": round(statistics.median(between), 2),
                "most_ms": round(max(between), 2),
            }
    return found


def payloads_mib(side: int, tokens: int, width: int, *, two_bytes: bool) -> dict[str, float]:
    """Return what passes between the stages for a picture with guidance, MiB.

    Args:
        side: pixels.
        tokens: Of a prompt's embedding.
        width: Of one.
        two_bytes: Whether embeddings travel as bfloat16's bits, as from a GPU; else float32.
    """
    return {
        "embeddings": 2 * tokens * width * (2 if two_bytes else 4) / _MIB,  # prompt and negative
        "latents": 16 * (side // 8) ** 2 * 4 / _MIB,
        "pixels": 3 * side**2 / _MIB,
    }


def _ms(span: ReceivedSpan) -> float:
    return (span.ended_ns - span.began_ns) / _MS
