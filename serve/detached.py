"""The context for work that outlives the request it was started from.

Serve cancels what a task asks of other deployments together with the HTTP request in whose context
it runs; an accepted job belongs to no request. Only the trace goes along.
"""

from __future__ import annotations

import contextvars

from opentelemetry import context as trace_context


def detached_context() -> contextvars.Context:
    """Return an empty context that carries the current trace and nothing else."""
    context = contextvars.Context()
    context.run(trace_context.attach, trace_context.get_current())
    return context
