"""Which Pipeline process this is: in leases, reports and the status."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray import serve

from serve.log_ids import add_trace_ids
from serve.recorders import place
from serve.span_sender import trace_this_process


@dataclass(frozen=True)
class PipelineIdentity:
    """A Pipeline process, as others tell it from its like."""

    replica: str
    pid: int
    node: str
    application: str = ""

    @classmethod
    def of_this_process(cls) -> PipelineIdentity:
        """Ask Serve and Ray; must run inside a replica."""
        trace_this_process(place() or {})
        add_trace_ids()
        context = serve.get_replica_context()
        node = ray.get_runtime_context().get_node_id()
        return cls(context.replica_id.unique_id, os.getpid(), node, context.app_name)

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)
