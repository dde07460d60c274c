"""What a trace looks like: whether its spans are one tree, and how much of a span others cover."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from loadtest.otlp_receiver import ReceivedSpan


def tree(spans: Sequence[ReceivedSpan]) -> tuple[ReceivedSpan, Mapping[str, list[ReceivedSpan]]]:
    """Return the root and each span's children by its id; fail where it is not one tree."""
    by_id = {span.span_id: span for span in spans}
    children: dict[str, list[ReceivedSpan]] = defaultdict(list)
    for span in spans:
        if span.parent_id in by_id:
            children[span.parent_id].append(span)
    roots = [span for span in spans if span.parent_id not in by_id]
    assert len(roots) == 1, [(span.name, span.parent_id) for span in roots]
    return roots[0], children


def covered(parts: Iterable[ReceivedSpan], whole: ReceivedSpan) -> float:
    """Return the share of a span's time in which at least one of the parts was open."""
    within = sorted(
        (max(part.began_ns, whole.began_ns), min(part.ended_ns, whole.ended_ns)) for part in parts
    )
    total, reached = 0, whole.began_ns
    for began, ended in within:
        total += max(0, ended - max(began, reached))
        reached = max(reached, ended)
    return total / (whole.ended_ns - whole.began_ns)
