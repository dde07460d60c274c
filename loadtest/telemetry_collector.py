"""Takes OTLP over HTTP and puts it away unread: who is measured shares the cores with it."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from loadtest.otlp_sink import TRACES, otlp_sink

_LONGEST_S = 60.0
_POLL_S = 0.2


class Collector:
    """What came so far, and where to send it."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.messages = 0
        self.bytes = 0
        self._unread: list[bytes] = []
        self._pictures = 0
        self._spans = 0

    def take(self, path: str, body: bytes, encoding: str | None) -> None:
        """Put a message away."""
        self.messages += 1
        self.bytes += len(body)
        if path == TRACES:
            self._unread.append(gzip.decompress(body) if encoding == "gzip" else body)

    def wait_for(self, pictures: int) -> dict[str, int]:
        """Read what came until it has the traces of so many pictures; return what there was.

        Raises:
            TimeoutError: Some do not come within a minute.
            RuntimeError: There are more than should have been traced.
        """
        deadline = time.monotonic() + _LONGEST_S
        while self._read() < pictures:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._pictures} of {pictures} pictures were traced")
            time.sleep(_POLL_S)
        if self._pictures > pictures:
            raise RuntimeError(f"{self._pictures} pictures were traced, not {pictures}")
        return {"messages": self.messages, "bytes": self.bytes, "spans": self._spans}

    def _read(self) -> int:
        while self._unread:
            message = ExportTraceServiceRequest.FromString(self._unread.pop(0))
            for resource in message.resource_spans:
                for scope in resource.scope_spans:
                    self._spans += len(scope.spans)
                    self._pictures += sum(
                        span.name.startswith("generate_content ") for span in scope.spans
                    )
        return self._pictures


@contextmanager
def collector() -> Iterator[Collector]:
    """Run one on a free port of loopback."""
    running = Collector()
    with otlp_sink(running.take) as running.endpoint:
        yield running
