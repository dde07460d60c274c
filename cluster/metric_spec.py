"""What a metric is: one description for Prometheus, by way of Ray, and for OTLP.

Names are Prometheus': base units, with the unit at the end, and `_total` behind that of a counter.
OpenTelemetry's name is the same without those and with dots, so that a collector which adds them
again arrives at the same name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

_SUFFIXES: Final = {
    "s": "seconds",
    "J": "joules",
    "Cel": "celsius",
    "W": "watts",
    "By": "bytes",
    "1": "ratio",
}
"""UCUM, as OpenTelemetry gives units -> the end of a name in Prometheus. Units in braces, such as
`{image}`, count things and have none."""


@dataclass(frozen=True)
class MetricSpec:
    """One metric.

    Attributes:
        name: In Prometheus, but for the `ray_` that Ray puts in front.
        kind: Of it.
        unit: As UCUM has it.
        meaning: For people.
        labels: Its own; Ray adds deployment, replica and application.
        buckets: Upper bounds, of a histogram.
        is_rare: It comes with the first event or card that tells it, which may never be.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    is_rare: bool = False

    @property
    def otel_name(self) -> str:
        """Its name in OpenTelemetry."""
        name = self.name.removesuffix("_total")
        if (suffix := _SUFFIXES.get(self.unit)) is not None:
            name = name.removesuffix(f"_{suffix}")
        return name.replace("_", ".")
