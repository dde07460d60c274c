"""Ray for one Kelvin: started on this machine and stopped with it, or a cluster that is there.

`RAY_ADDRESS` decides, as it does for every Ray program.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import ray

from serve import telemetry
from serve.config import PoolSettings, Settings
from serve.environment import exported
from serve.errors import ConfigurationError
from serve.further_models import ModelFacts
from serve.http.proxy_headers import ENVIRONMENT

# Of a picture of 1024 x 1024 under way some 12 MiB lie in Ray's object store: the embeddings of its
# prompts, twice, latents and pixels. Where the store is full, stages stand still until objects have
# been written to disk. It takes memory only as it is used.
_MOST_STORE_BYTES, _LEAST_STORE_BYTES = 4 << 30, 256 << 20
_STORE_SHARE = 0.3  # of what the machine has, as Ray's own default

_SLACK = 1e-6  # sums of fractions of a card

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}


def joins_cluster() -> bool:
    """Return whether Kelvin goes to a cluster that is there already."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def running_ray(settings: Settings, further: Sequence[ModelFacts] = ()) -> Iterator[None]:
    """Start or join Ray; at the end stop or leave it.

    A Ray of our own is taken down as it is, Serve included: stopping Serve first takes seconds and
    saves nothing, for accepted jobs are in the object store.

    Args:
        settings: All of them.
        further: Models beside the service's own.

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
            cleanup.enter_context(exported(_QUIET | ENVIRONMENT))
            # Unix sockets below this folder must stay under 107 characters.
            folder = tempfile.mkdtemp(prefix="kelvin-", dir="/tmp")
            cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
            options |= {
                "num_cpus": max(
                    os.cpu_count() or 1,
                    math.ceil(_reserved(settings, further, at_most=True)["CPU"]),
                ),
                "include_dashboard": False,
                "object_store_memory": object_store_bytes(),
                "_temp_dir": folder,
            }
        cleanup.callback(ray.shutdown)
        _init(options)
        check_resources(_reserved(settings, further), ray.cluster_resources())
        yield


def object_store_bytes(shared_memory: str = "/dev/shm") -> int:
    """Return how large a Ray of our own may let its object store become.

    Args:
        shared_memory: Where Ray puts it; what is free there bounds it.
    """
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if os.path.isdir(shared_memory):
        free.append(shutil.disk_usage(shared_memory).free)
    return max(_LEAST_STORE_BYTES, min(_MOST_STORE_BYTES, int(_STORE_SHARE * min(free))))


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


def _reserved(
    settings: Settings, further: Sequence[ModelFacts], *, at_most: bool = False
) -> dict[str, float]:
    """Return Ray resource -> how much of it all replicas reserve.

    Args:
        settings: All of them.
        further: Models beside the service's own.
        at_most: With as many replicas as autoscaling and redeploys may start, not those to begin
            with.
    """
    groups = [settings.pools, *(facts.own_pools for facts in further)]
    pools = [pool for stages in groups for stage in stages.values() for pool in stage]
    reserved = reserved_by(pools, at_most=at_most)
    pipeline = settings.pipeline
    pipelines = pipeline.num_replicas + (pipeline.surge_replicas if at_most else 0)
    return reserved | {"CPU": reserved["CPU"] + pipelines * pipeline.num_cpus}


def reserved_by(pools: Iterable[PoolSettings], *, at_most: bool = False) -> dict[str, float]:
    """Return Ray resource -> how much of it the replicas of pools reserve.

    Args:
        pools: Of stages.
        at_most: With as many replicas as autoscaling and redeploys may start, not those to begin
            with.
    """
    replicas = [
        (pool.most_replicas + pool.surge_replicas if at_most else pool.num_replicas, pool)
        for pool in pools
    ]
    return {
        "CPU": sum(number * pool.num_cpus for number, pool in replicas),
        "GPU": sum(number * pool.num_gpus for number, pool in replicas),
    }


def check_resources(reserved: Mapping[str, float], present: Mapping[str, float]) -> None:
    """Refuse a plan that could not be placed; Serve would wait for ever.

    Args:
        reserved: Ray resource -> how much of it is needed.
        present: Ray resource -> how much of it there is.

    Raises:
        ConfigurationError: Names the resource.
    """
    for resource, needed in reserved.items():
        there = present.get(resource, 0.0)
        if needed > there + _SLACK:
            raise ConfigurationError(
                f"The pools reserve {needed:g} {resource}s; there are {there:g}.",
                field=f"num_{resource.lower()}s",
                value=needed,
                allowed=f"at most {there:g} over all replicas",
            )
