"""Host tensors to a device, in an order known beforehand.

A copy from mapped memory straight to a card is staged by the driver on one thread, and waits for
every page fault. Here a thread of its own fills pinned buffers with what comes next, so that page
faults, transfer, and what the caller does with each tensor go on at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from queue import Queue
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

_BUFFERS = 4
_BUFFER_BYTES = 32 << 20


class _Piece(NamedTuple):
    """Bytes of the next tensor, as far as one buffer holds them."""

    buffer: int
    length: int


class Upload:
    """Copies tensors to a device; what it returns never shares memory with the host's.

    A context: at its end all has arrived, or, after an error, what was to come is forgotten.

    Args:
        device: Where tensors go.
        coming: The tensors that will be uploaded, in that order, contiguous. On CUDA they are taken
            ahead of time, on another thread; what taking one raises, the upload of it raises.
    """

    def __init__(self, device: torch.device, coming: Iterable[Tensor]) -> None:
        self.device = device
        self._staging = _Staging(coming) if device.type == "cuda" else None

    def __call__(self, host: Tensor, out: Tensor | None = None) -> Tensor:
        """Return a copy on the device.

        Args:
            host: The next of those that were to come.
            out: Where it goes, if it has a place; contiguous, of the same dtype.
        """
        if out is None:
            out = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        if self._staging is None:
            return out.copy_(host)
        target = out.view(-1).view(torch.uint8)
        at = 0
        while at < len(target):
            at += self._staging.send_next(target[at:])
        return out

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._staging is not None:
            self._staging.close()


class _Staging:
    """Pinned buffers that one thread fills and another sends."""

    def __init__(self, coming: Iterable[Tensor]) -> None:
        self._buffers = [
            torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(_BUFFERS)
        ]
        self._sent = [torch.cuda.Event() for _ in range(_BUFFERS)]  # type: ignore[no-untyped-call]
        self._free: Queue[int | None] = Queue()
        self._filled: Queue[_Piece | BaseException] = Queue()
        for index in range(_BUFFERS):
            self._free.put(index)
        self._thread = threading.Thread(target=self._fill, args=(iter(coming),), daemon=True)
        self._thread.start()

    def send_next(self, target: Tensor) -> int:
        """Send the next piece to the beginning of a place; return its length in bytes."""
        piece = self._filled.get()
        if isinstance(piece, BaseException):
            raise piece
        buffer, sent = self._buffers[piece.buffer], self._sent[piece.buffer]
        target[: piece.length].copy_(buffer[: piece.length], non_blocking=True)
        sent.record(torch.cuda.current_stream(target.device))
        self._free.put(piece.buffer)
        return piece.length

    def close(self) -> None:
        """Wait until all that was sent has arrived, and end the thread."""
        self._free.put(None)
        self._thread.join()
        for sent in self._sent:
            sent.synchronize()

    def _fill(self, coming: Iterator[Tensor]) -> None:
        try:
            for host in coming:
                source = host.reshape(-1).view(torch.uint8)
                for begin in range(0, len(source), _BUFFER_BYTES):
                    index = self._free.get()
                    if index is None:
                        return
                    self._sent[index].synchronize()
                    piece = source[begin : begin + _BUFFER_BYTES]
                    self._buffers[index][: len(piece)].copy_(piece)
                    self._filled.put(_Piece(index, len(piece)))
            self._filled.put(LookupError("more is uploaded than was to come"))
        except BaseException as error:  # for the thread that waits for this tensor
            self._filled.put(error)
