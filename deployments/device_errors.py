"""Which of torch's errors mean that a device is full, and which that it is gone."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """True if less work at a time might have gone well."""
    # A CPU's allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_sticky(error: BaseException) -> bool:
    """True after a CUDA error, which every later call in the process may meet again.

    Running out of memory is none: `torch.OutOfMemoryError` neither is an AcceleratorError nor says
    "CUDA error". Libraries such as cuBLAS report theirs as plain RuntimeErrors.
    """
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)


def first_line(error: BaseException) -> str:
    """Return what an error says, without the advice that CUDA's go on with."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
