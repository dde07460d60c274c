"""Host tensors to a device through two pinned buffers, one filled while the other is sent.

A copy from mapped memory straight to a card is staged by the driver on one thread; torch fills a
pinned buffer with as many threads as it may use, page faults included.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BUFFER_BYTES = 64 << 20


class Upload:
    """Copies tensors to a device; what it returns never shares memory with the host's.

    Args:
        device: Where tensors go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[Tensor] = []
        self._sent: list[torch.cuda.Event] = []
        self._turn = 0
        if device.type == "cuda":
            for _ in range(2):
                buffer = torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
                self._buffers.append(buffer)
                self._sent.append(torch.cuda.Event())  # type: ignore[no-untyped-call]

    def __call__(self, host: Tensor, out: Tensor | None = None) -> Tensor:
        """Return a copy on the device.

        Args:
            host: Contiguous.
            out: Where it goes, if it has a place; contiguous, of the same dtype.
        """
        if out is None:
            out = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        if not self._buffers:
            return out.copy_(host)
        source = host.reshape(-1).view(torch.uint8)
        target = out.view(-1).view(torch.uint8)
        for begin in range(0, len(source), _BUFFER_BYTES):
            piece = source[begin : begin + _BUFFER_BYTES]
            buffer, sent = self._buffers[self._turn], self._sent[self._turn]
            sent.synchronize()
            buffer[: len(piece)].copy_(piece)
            target[begin : begin + len(piece)].copy_(buffer[: len(piece)], non_blocking=True)
            sent.record(torch.cuda.current_stream(self.device))
            self._turn = 1 - self._turn
        return out

    def finish(self) -> None:
        """Wait until all has arrived."""
        for sent in self._sent:
            sent.synchronize()
