"""Ray for one Kelvin: started on this machine and stopped with it, or a cluster that is there.

`RAY_ADDRESS` decides, as it does for every Ray program.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray

from serve import telemetry
from serve.config import Settings
from serve.environment import exported
from serve.errors import ConfigurationError

# What passes through it at once is some embeddings and pictures, a few MiB each.
_OBJECT_STORE_BYTES = 256 << 20

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}


def joins_cluster() -> bool:
    """Return whether Kelvin goes to a cluster that is there already."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def running_ray(settings: Settings) -> Iterator[None]:
    """Start or join Ray; at the end stop or leave it.

    A Ray of our own is taken down as it is, Serve included: stopping Serve first takes seconds and
    saves nothing, for accepted jobs are in the object store.

    Raises:
        ConfigurationError: Ray does not start or cannot be joined, or has not what the settings
            reserve.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # It warns that a new cluster is protected by a token, which is as it should be.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    with ExitStack() as cleanup:
        cleanup.enter_context(exported(telemetry.environment(settings)))
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        if not joins_cluster():
            cleanup.enter_context(exported(_QUIET))
            # Unix sockets below this folder must stay under 107 characters.
            folder = tempfile.mkdtemp(prefix="kelvin-", dir="/tmp")
            cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
            options |= {
                "num_cpus": max(
                    os.cpu_count() or 1, math.ceil(_reserved(settings, at_most=True)["CPU"])
                ),
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_temp_dir": folder,
            }
        cleanup.callback(ray.shutdown)
        _init(options)
        _check_resources(settings)
        yield


def _init(options: dict[str, Any]) -> None:
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not joins_cluster():
            raise ConfigurationError(f"Ray does not start: {reason}") from error
        raise ConfigurationError(
            f"The Ray cluster cannot be joined: {reason}",
            field="RAY_ADDRESS",
            value=os.environ["RAY_ADDRESS"],
            allowed="the address of a running cluster of this Ray version, with "
            "RAY_AUTH_MODE=token and its token where it asks for one; unset it to start one here",
        ) from error


def _reserved(settings: Settings, *, at_most: bool = False) -> dict[str, float]:
    """Return Ray resource -> how much of it all replicas reserve.

    Args:
        settings: All of them.
        at_most: With as many replicas as autoscaling may start, not those to begin with.
    """
    replicas = [
        (pool.most_replicas if at_most else pool.num_replicas, pool)
        for pools in settings.pools.values()
        for pool in pools
    ]
    pipeline = settings.pipeline
    return {
        "CPU": sum(number * pool.num_cpus for number, pool in replicas)
        + pipeline.num_replicas * pipeline.num_cpus,
        "GPU": sum(number * pool.num_gpus for number, pool in replicas),
    }


def _check_resources(settings: Settings) -> None:
    """Refuse a plan that could never be placed; Serve would wait for ever."""
    present = ray.cluster_resources()
    for resource, reserved in _reserved(settings).items():
        if reserved > present.get(resource, 0.0):
            raise ConfigurationError(
                f"The pools reserve {reserved:g} {resource}s; there are "
                f"{present.get(resource, 0.0):g}.",
                field=f"num_{resource.lower()}s",
                value=reserved,
                allowed=f"at most {present.get(resource, 0.0):g} over all replicas",
            )
