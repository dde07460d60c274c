"""The NVIDIA card that a choice is made for: its name, what it can do, and the memory left on it.

A newer card can be taken for an older one, so that the ways of cards that are not at hand can be
run and checked. The results are those cards'; the speeds are not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from serve.errors import ConfigurationError

GIB = 1 << 30

# Compute capabilities on which Kelvin's speeds were measured: H100.
_MEASURED = ((9, 0),)


@dataclass(frozen=True)
class Card:
    """One card as `deployments.sd3.precision` sees it."""

    name: str
    real_capability: tuple[int, int]
    capability: tuple[int, int]  # what it is taken for
    usable_bytes: int  # what this process may still allocate

    @classmethod
    def of(cls, device: torch.device, pretend: str | None = None) -> Card:
        """Ask CUDA.

        Args:
            device: A CUDA device.
            pretend: `sm_86`, `sm_89` and the like: take it for a card of that capability.

        Raises:
            ConfigurationError: There is no such capability, or it is newer than the card's.
        """
        real = torch.cuda.get_device_capability(device)
        taken_for = real if pretend is None else _parse(pretend)
        if taken_for > real:
            raise ConfigurationError(
                f"{torch.cuda.get_device_name(device)} is {_sm(real)} and cannot be taken for the"
                f" newer {pretend}.",
                field="pretend",
                value=pretend,
                allowed=f"{_sm(real)} or older",
            )
        return cls(torch.cuda.get_device_name(device), real, taken_for, usable_bytes(device))

    @property
    def words(self) -> str:
        """Name and capability, e.g. `NVIDIA A10G (sm_86)`."""
        if self.capability == self.real_capability:
            return f"{self.name} ({_sm(self.capability)})"
        return f"{self.name} ({_sm(self.real_capability)}) taken for {_sm(self.capability)}"

    @property
    def speed_note(self) -> str:
        """What must stand wherever speeds of such a card would: nothing where they are known."""
        if self.capability in _MEASURED:
            return ""
        return f"speeds of {_sm(self.capability)} cards are not measured by Kelvin's benchmarks"


def usable_bytes(device: torch.device) -> int:
    """Return what this process may still allocate: free memory, within the allocator's limit."""
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    cached = torch.cuda.memory_reserved(device) - allocated
    return max(0, min(free + cached, _limit(device, total) - allocated))


def most_bytes(device: torch.device) -> int:
    """Return what this process may ever hold: the card's memory, within the allocator's limit."""
    _, total = torch.cuda.mem_get_info(device)
    return _limit(device, total)


def _limit(device: torch.device, total: int) -> int:
    # Unlike its neighbours this one wants to be told which of them `cuda` is.
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(torch.cuda.get_per_process_memory_fraction(index) * total)


def gib(size_bytes: float) -> str:
    """Return a size in words, e.g. `15.0 GiB`."""
    return f"{size_bytes / GIB:.1f} GiB"


def _parse(name: str) -> tuple[int, int]:
    match = re.fullmatch(r"sm_(\d+)(\d)", name)
    if match is None:
        raise ConfigurationError(
            f"{name!r} is no compute capability.",
            field="pretend",
            value=name,
            allowed="such as sm_86 (A10G), sm_89 (L4) or sm_90 (H100)",
        )
    return int(match[1]), int(match[2])


def _sm(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"
