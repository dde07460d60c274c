"""What names a card to NVML: its UUID, which torch knows."""

from __future__ import annotations

import logging

import torch

_log = logging.getLogger(__name__)


def card_uuid(device: torch.device) -> str | None:
    """Return the UUID of a CUDA device, without prefix; None for any other or if torch has none.

    CUDA_VISIBLE_DEVICES is respected: `cuda:0` is the first card that this process may see.
    """
    if device.type != "cuda":
        return None
    try:
        return str(torch.cuda.get_device_properties(device).uuid)
    except (RuntimeError, AssertionError, AttributeError) as error:
        # torch asserts that a driver is there; builds without CUDA have no `uuid`.
        _log.info("%s has no UUID: %s", device, error)
        return None
