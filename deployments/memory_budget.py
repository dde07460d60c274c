"""What a replica's memory can take: requests are admitted, not hoped for.

Two things are counted: what each live request holds between forwards, and the peak of the largest
forward, which grows with rows x tokens. What can never fit is refused at once, what fits later
waits, and a forward takes no more rows than there is room for. What can ever fit is a matter of the
card and of this process alone; what fits now depends on neighbours, too, so the card is asked now
and then (`look`), by the engine's thread and under no lock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from deployments.job_size import LATENT_PIXELS, live_bytes, most_rows, token_shape
from deployments.payloads import DenoiseJob
from deployments.schedule import MAX_ROWS
from deployments.sd3.card import most_bytes, usable_bytes
from deployments.step_costs import TokenShape
from serve.checkpoints.memory import FORWARD_HEADROOM, GUESSED_BYTES_PER_TOKEN
from serve.errors import InvalidRequest

GIB = 1 << 30

# Left on a card for what the allocator does not see: libraries' workspaces, lazily loaded kernels.
_CUDA_MARGIN_BYTES = GIB // 2
# A CPU's memory is shared with everything else on the machine, so a limit stands in.
_CPU_CAPACITY_BYTES = 4 * GIB
# Successful forwards until what ran out is tried again; each time in vain doubles them.
_PATIENCE = 64
_MOST_PATIENCE = 4096


@dataclass(frozen=True)
class ModelMemory:
    """What a request's bytes depend on."""

    channels: int  # of the latents
    dtype: torch.dtype  # that embeddings are kept in


class MemoryBudget:
    """Bytes for live requests and for the forward under way.

    Args:
        capacity_bytes: For both together, beside the weights, if no neighbour takes any.
        bytes_per_token: Peak of a forward for one token of one row.
        available: Returns the bytes that are free this moment, where that can be asked: a card may
            be shared. None: `capacity_bytes` less what live requests hold.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        bytes_per_token: float = GUESSED_BYTES_PER_TOKEN,
        available: Callable[[], int] | None = None,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.bytes_per_token = bytes_per_token
        self._available = available
        self._room = capacity_bytes  # what there was for both when last looked
        self._too_many: int | None = None  # rows x tokens of the smallest forward that did not fit
        self._patience = _PATIENCE
        self._until_tried_again = 0

    @classmethod
    def of_device(
        cls, device: torch.device, bytes_per_token: float = GUESSED_BYTES_PER_TOKEN
    ) -> MemoryBudget:
        """Return the budget of a device; call it after the model is loaded and warmed up.

        Args:
            device: That holds the model.
            bytes_per_token: As measured there.
        """
        if device.type != "cuda":
            return cls(_CPU_CAPACITY_BYTES, bytes_per_token=bytes_per_token)
        # What stays reserved when nothing is cached belongs to captured graphs and is not free.
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved(device)
        of_graphs = reserved - torch.cuda.memory_allocated(device)

        def available() -> int:
            return usable_bytes(device) - of_graphs - _CUDA_MARGIN_BYTES

        # Not what is free now: a neighbour that loads its weights must not shrink this for ever.
        capacity = max(most_bytes(device) - reserved - _CUDA_MARGIN_BYTES, 0)
        return cls(capacity, bytes_per_token=bytes_per_token, available=available)

    def look(self, held_bytes: int) -> None:
        """Ask the device what there is room for now; between forwards, with no lock held.

        Args:
            held_bytes: By live requests.
        """
        if self._available is not None:
            self._room = min(self.capacity_bytes, self._available() + held_bytes)

    def forward_bytes(self, shape: TokenShape, rows: int) -> int:
        """Return the peak of a forward of so many rows, above what is held before it."""
        return int(rows * shape.tokens * self.bytes_per_token * FORWARD_HEADROOM)

    def free_bytes(self, held_bytes: int) -> int:
        """Return what was free when last looked, had live requests held so many bytes then."""
        return self._room - held_bytes

    def row_limit(self, shape: TokenShape, held_bytes: int) -> int:
        """Return the most rows that a forward of a shape has room for, at least 1."""
        fitting = self.free_bytes(held_bytes) // max(self.forward_bytes(shape, 1), 1)
        if self._too_many is not None:
            fitting = min(fitting, (self._too_many - 1) // shape.tokens)
        return max(1, min(MAX_ROWS, fitting))

    def ran_out(self, shape: TokenShape, rows: int) -> None:
        """Remember for a while that a forward did not fit, so that the next ones are smaller."""
        failed = rows * shape.tokens
        self._too_many = failed if self._too_many is None else min(self._too_many, failed)
        self._until_tried_again = self._patience

    def went_well(self) -> None:
        """Note a forward that fitted; after some of them what ran out is tried again."""
        if self._too_many is None:
            return
        self._until_tried_again -= 1
        if self._until_tried_again <= 0:
            self._too_many = None
            self._patience = min(2 * self._patience, _MOST_PATIENCE)

    def forget(self) -> None:
        """Drop what `ran_out` said; whoever took the memory may have gone."""
        self._too_many = None
        self._patience = _PATIENCE

    def check(self, job: DenoiseJob, model: ModelMemory) -> None:
        """Refuse a job that would not fit even alone.

        Raises:
            InvalidRequest: Naming its size, what it takes and the largest square that fits.
        """
        need = self._needed(job, model)
        if need <= self.capacity_bytes:
            return
        size = f"{job.width}x{job.height}"
        raise InvalidRequest(
            f"{size} pixels take {need / GIB:.1f} GiB beside the model's weights, and this replica "
            f"has {self.capacity_bytes / GIB:.1f} GiB.",
            field="width" if job.width >= job.height else "height",
            value=size,
            allowed=self._largest(job, model),
        )

    def _needed(self, job: DenoiseJob, model: ModelMemory) -> int:
        held = live_bytes(job, model.channels, model.dtype)
        return held + self.forward_bytes(token_shape(job), most_rows(job))

    def _largest(self, job: DenoiseJob, model: ModelMemory) -> str:
        multiple = 2 * LATENT_PIXELS  # a token is 2 x 2 latents
        for side in range(max(job.width, job.height), 0, -multiple):
            if self._needed(replace(job, width=side, height=side), model) <= self.capacity_bytes:
                return f"at most {side}x{side} pixels, or as many in another shape"
        return "no size at all: the card has too little memory beside the weights"
