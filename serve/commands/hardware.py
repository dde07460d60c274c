"""What this machine can do: its GPUs by NVML, and whether the driver is new enough for torch.

NVML is asked rather than torch because it answers when the driver is too old for torch, which is
what a person needs to know then. Nothing here fails on a machine without a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from serve.commands.finding import Finding
from serve.config import Precision
from serve.errors import KelvinError

# CUDA major version -> oldest Linux driver of its minor version compatibility:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html, table 1.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}

_GIB = 1 << 30
_LEAST_FREE_GIB = 2


@dataclass(frozen=True)
class TorchBuild:
    """Which torch is installed; `cuda` is None for a build that knows no NVIDIA GPU."""

    version: str
    cuda: str | None


@dataclass(frozen=True)
class Gpu:
    """One card as NVML names it."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Gpus:
    """What NVML answers. Without a driver there are no cards and `absent` says why."""

    driver: str | None
    cards: tuple[Gpu, ...]
    absent: str = ""


def find_torch() -> TorchBuild | None:
    """Return the installed torch without importing it, which takes seconds; None if absent."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    facts = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return TorchBuild(str(facts["__version__"]), facts.get("cuda"))


def find_gpus() -> Gpus:
    """Return the cards of this machine; none on a machine without driver or card."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Gpus(None, (), str(error))
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
        cards = tuple(
            Gpu(
                pynvml.nvmlDeviceGetName(handle),
                int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
            )
            for handle in handles
        )
    except pynvml.NVMLError as error:
        return Gpus(None, (), str(error))
    finally:
        pynvml.nvmlShutdown()
    return Gpus(driver, cards)


def check_python() -> Finding:
    """Report the interpreter and the cores it may use."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", "ok", f"{version}, {_usable_cores()} cores")


def check_torch(build: TorchBuild | None, gpus: Gpus) -> Finding:
    """Report the torch build and whether it can use the cards that are there."""
    if build is None:
        return Finding("torch", "failed", "not installed", "run `make install`")
    if build.cuda is None and gpus.cards:
        return Finding(
            "torch",
            "warning",
            f"{build.version}, built without CUDA: the GPUs will stay idle",
            "install a CUDA build: https://pytorch.org/get-started/locally",
        )
    return Finding("torch", "ok", f"{build.version}, " + _cuda_words(build))


def check_gpus(gpus: Gpus) -> Finding:
    """Report the cards; none is fine, everything then runs on the CPU."""
    if not gpus.cards:
        why = f" (NVML: {gpus.absent})" if gpus.absent else ""
        return Finding("gpu", "ok", f"none, stages run on the CPU{why}")
    cards = ", ".join(
        f"{card.name} {card.memory_bytes / _GIB:.0f} GiB sm_{card.capability[0]}"
        f"{card.capability[1]}"
        for card in gpus.cards
    )
    return Finding("gpu", "ok", cards)


def check_driver(build: TorchBuild | None, gpus: Gpus) -> Finding:
    """Report whether the NVIDIA driver is new enough for the CUDA that torch was built with."""
    if gpus.driver is None:
        return Finding("driver", "ok", "no NVIDIA driver, none needed on the CPU")
    if build is None or build.cuda is None:
        return Finding("driver", "ok", f"{gpus.driver}, not used by this torch build")
    major = int(build.cuda.split(".")[0])
    oldest = OLDEST_DRIVER.get(major)
    if oldest is None:
        return Finding(
            "driver",
            "warning",
            f"{gpus.driver}; the oldest driver for CUDA {build.cuda} is not known to Kelvin",
            "compare with NVIDIA's CUDA release notes",
        )
    if int(gpus.driver.split(".")[0]) < oldest:
        return Finding(
            "driver",
            "failed",
            f"{gpus.driver} is too old for torch {build.version}: CUDA {major} needs >= {oldest}",
            f"update the NVIDIA driver to {oldest} or newer, or install a torch built for an "
            "older CUDA",
        )
    return Finding("driver", "ok", f"{gpus.driver}, CUDA {major} needs >= {oldest}")


def check_precision(
    requested: Precision, build: TorchBuild | None, gpus: Gpus, transformer: Path | None = None
) -> Finding:
    """Report what precision a denoiser on this machine would use and why.

    On a card this measures as the denoiser does when it starts, in a fraction of a second.

    Args:
        requested: By the settings.
        build: Installed torch.
        gpus: Found cards.
        transformer: Folder of the model's transformer, whose size matters; None if not known.
    """
    if build is None:
        return Finding("precision", "failed", "unknown without torch", "run `make install`")
    device = "cuda" if gpus.cards and build.cuda is not None else "cpu"
    try:
        from deployments.sd3.precision import as_choice

        choice = as_choice(requested, device, transformer)
    except KelvinError as error:
        return Finding("precision", "failed", error.message, error.allowed or "use auto")
    except (ImportError, OSError, RuntimeError) as error:
        return Finding("precision", "failed", f"torch cannot be used: {error}", "reinstall torch")
    return Finding("precision", "ok", f"{choice.label} on {device}: {choice.reason}")


def check_disk(folder: Path) -> Finding:
    """Report the free space where the embedded store keeps its data."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free_gib = shutil.disk_usage(existing).free / _GIB
    detail = f"{free_gib:.1f} GiB free at {existing}"
    if not os.access(existing, os.W_OK):
        return Finding(
            "disk",
            "failed",
            f"{existing} cannot be written",
            "set embedded_store.data_dir to a folder that can",
        )
    if free_gib < _LEAST_FREE_GIB:
        return Finding(
            "disk", "failed", detail, f"free at least {_LEAST_FREE_GIB} GiB, or set data_dir"
        )
    return Finding("disk", "ok", detail)


def _usable_cores() -> int:
    # A container may be given fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cuda_words(build: TorchBuild) -> str:
    return f"built for CUDA {build.cuda}" if build.cuda else "CPU only"
