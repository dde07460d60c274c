"""What the three stage classes share: who this replica is, its device, and its status.

Torch is imported inside the functions: the builder imports the stage classes in processes that
never compute.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from opentelemetry.trace import Span, SpanKind
from ray import serve

from serve import telemetry
from serve.config import PoolSettings
from serve.errors import ConfigurationError
from serve.log_ids import add_trace_ids
from serve.recorders import place
from serve.span_sender import trace_this_process

if TYPE_CHECKING:
    import torch

# torch unpickles what it finds in a cache of compiled graphs: that of this node's own disk and no
# other one, whatever the environment says. What reads each variable, when it is first imported:
SHARED_CACHES: Mapping[str, tuple[str, str]] = {
    "TORCHINDUCTOR_FX_GRAPH_REMOTE_CACHE": ("torch._inductor.config", "fx_graph_remote_cache"),
    "TORCHINDUCTOR_AUTOTUNE_REMOTE_CACHE": ("torch._inductor.config", "autotune_remote_cache"),
    "TORCHINDUCTOR_BUNDLED_AUTOTUNE_REMOTE_CACHE": (
        "torch._inductor.config",
        "bundled_autotune_remote_cache",
    ),
    "TORCHINDUCTOR_AUTOGRAD_REMOTE_CACHE": (
        "torch._functorch.config",
        "enable_remote_autograd_cache",
    ),
    "TORCH_DYNAMO_AUTOMATIC_DYNAMIC_REMOTE_PGO": (
        "torch._dynamo.config",
        "automatic_dynamic_remote_pgo",
    ),
}


@dataclass(frozen=True)
class ReplicaStatus:
    """What one replica says of itself in `/v1/status`."""

    stage: str
    pool: str
    replica: str
    pid: int
    node: str
    device: str
    precision: str
    precision_reason: str
    resident_bytes: int  # weights held in memory, in the chosen precision
    queue_length: int  # work accepted and not finished
    cache_hits: int
    cache_misses: int
    # Of a denoiser's forwards, by picture size and rows (`forward_report.report_forwards`).
    measured_ms: dict[str, float] = field(default_factory=dict)
    path: dict[str, str] = field(default_factory=dict)  # graph or eager
    attention: dict[str, str] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)  # `replica_load.shown_load`
    heat: dict[str, Any] | None = None  # `replica_load.shown_heat`; None: nothing is read here

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Identity:
    """Which replica of which pool this process is."""

    stage: str
    pool: str
    replica: str
    pid: int
    node: str

    @classmethod
    def of_this_process(cls, stage: str, pool: PoolSettings) -> Identity:
        """Ask Serve and Ray; the pool's name stands in where no Serve runs."""
        add_trace_ids()
        try:
            replica = serve.get_replica_context().replica_id.unique_id
            trace_this_process(place() or {})
        except serve.exceptions.RayServeException:
            replica = pool.name
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "local"
        return cls(stage, pool.name, replica, os.getpid(), node)

    def span(
        self,
        work: str,
        traceparent: str | None,
        attributes: Mapping[str, telemetry.Attribute] | None = None,
        *,
        is_current: bool = True,
    ) -> AbstractContextManager[Span]:
        """Return a span of this replica's part in a request.

        Args:
            work: `text`, `encode`, `denoise` or `decode`.
            traceparent: Of the Pipeline's span; None: the current one, if there is one.
            attributes: As of `telemetry.span`.
            is_current: As of `telemetry.span`.
        """
        return telemetry.span(
            f"kelvin.{work}.replica",
            {"kelvin.pool": self.pool, "kelvin.replica": self.replica, **(attributes or {})},
            parent=traceparent,
            kind=SpanKind.SERVER,
            is_current=is_current,
        )


def all_cores() -> int:
    """Return how many cores this process may use.

    Ray's own OMP_NUM_THREADS follows the CPUs it reserves, which are bookkeeping here.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux; a container may be given fewer
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def half_the_cores() -> int:
    """Return half of them, at least one: what stages take that denoising shares the machine with.

    OpenMP's threads spin while they wait for each other.
    """
    return max(1, all_cores() // 2)


def cores_to_denoise(pool: PoolSettings) -> int:
    """Return all cores where a pool is one replica without a card: nearly all work is its work."""
    is_alone = pool.most_replicas == 1 and not pool.num_gpus
    return all_cores() if is_alone else half_the_cores()


def prepare_torch(pool: PoolSettings, threads: int) -> torch.device:
    """Set this process's threads, determinism and caches; return the device its settings name.

    To be called before anything is compiled.

    Args:
        pool: Of this replica.
        threads: Of torch, where the pool does not say.

    Raises:
        ConfigurationError: The pool asks for a GPU and torch sees none.
    """
    import torch

    for variable, (module, attribute) in SHARED_CACHES.items():
        os.environ[variable] = "0"
        if module in sys.modules:
            setattr(sys.modules[module], attribute, False)
    torch.set_num_threads(pool.torch_threads or threads)
    if not pool.num_gpus:
        torch.use_deterministic_algorithms(True)
        # It also overwrites every new tensor, which finds bugs, costs time and decides no result.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigurationError(
            "The pool reserves a GPU, but torch sees none: no card, or a driver too old for this "
            f"torch {torch.__version__} (CUDA {torch.version.cuda}).",
            field=f"{pool.name}.num_gpus",
            value=pool.num_gpus,
            allowed="0 to run on the CPU; `kelvin doctor` says what is wrong",
        )
    return torch.device("cuda")
