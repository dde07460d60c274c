"""One at a time: whoever loads or unloads a model of a service has its turn.

Looking whether a model is there and deploying it are two calls to Serve; between them another
admin, on another machine, may do the same. The turn is a named actor, whose name Ray gives to one
process and takes back when that process dies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray

from serve.errors import ModelConflict

_NAMESPACE = "kelvin"


class _Turn:
    """Does nothing but exist."""


@contextmanager
def admin_turn(name: str) -> Iterator[None]:
    """Have the turn with a model while it is loaded or unloaded.

    Args:
        name: Of the model.

    Raises:
        ModelConflict: Another has it.
    """
    options = {"name": f"models/{name}", "namespace": _NAMESPACE, "num_cpus": 0}
    try:
        turn = ray.remote(_Turn).options(**options).remote()
    except ValueError:
        raise ModelConflict(
            f"Model {name!r} is being loaded or unloaded by another.",
            field="model",
            value=name,
            allowed="the same once that has ended",
        ) from None
    try:
        yield
    finally:
        ray.kill(turn)
