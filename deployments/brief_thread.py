"""Torch work done in a thread that is gone afterwards, and with it the helpers that it had.

OpenMP gives each thread that computes a team of its own, and keeps it while the thread lives. As
soon as a process has more threads in teams than there are CPUs, GCC's libgomp lets all of them
sleep at every barrier instead of spinning briefly: a step of the built-in model with two threads on
two CPUs took 161 ms beside the team that had loaded the weights, 57 without.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Made = TypeVar("Made")


def in_brief_thread(device: torch.device, make: Callable[[], Made]) -> Made:
    """Return what `make` returns, or raise what it raises; on a card it is simply called.

    Args:
        device: What the work is for.
        make: The work.
    """
    if device.type != "cpu":
        return make()
    with ThreadPoolExecutor(1, thread_name_prefix="brief") as once:
        return once.submit(make).result()
