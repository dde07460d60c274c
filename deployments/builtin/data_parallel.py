"""Several processes train one model, one on each GPU: what they share, and when.

Written out by hand because there is little of it: gradients lie in one flat buffer, so a step needs
one all-reduce, and the clock of rank 0 decides everything that time decides (the learning rate, the
end, when to save), so that all ranks take the same steps. Every rank then holds the same weights:
the reduced gradients are the same bits everywhere, and so are the updates that follow from them.

The environment says who takes part, as ``torchrun`` sets it (``RANK``, ``WORLD_SIZE``,
``LOCAL_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``); without it there is one process, and nothing here
does anything.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import timedelta

import torch
from torch import distributed

# A rank waits this long for another that evaluates, saves or compiles.
_PATIENCE = timedelta(minutes=8)


@dataclass(frozen=True, slots=True)
class Pace:
    """What the clock of rank 0 says about the step that comes next.

    Attributes:
        progress: of the budget, from 0 to 1.
        stop: whether to end now.
        report: whether to read and report the losses first.
        checkpoint: whether to save first.
        look: whether to evaluate first.
    """

    progress: float
    stop: bool = False
    report: bool = False
    checkpoint: bool = False
    look: bool = False


class Ranks:
    """The processes of one run, seen from one of them.

    Args:
        rank: of this process.
        world_size: number of processes.
        local_rank: number of this process's GPU.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not lie in a world of {world_size}")
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self._clock: distributed.ProcessGroup | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Ranks":
        """The ranks that ``torchrun``'s variables name; a single one without them."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, world_size, local_rank = (int(environment.get(name, "0")) for name in names)
        return cls(rank, max(1, world_size), local_rank)

    @property
    def first(self) -> bool:
        """Whether this process logs, evaluates and saves."""
        return self.rank == 0

    def join(self, device: torch.device) -> None:
        """Meet the other ranks: NCCL between GPUs, gloo between CPUs, gloo for the clock.

        Raises:
            torch.distributed.DistError: the others did not come.
        """
        if self.world_size == 1:
            return
        is_cuda = device.type == "cuda"
        distributed.init_process_group(
            "nccl" if is_cuda else "gloo",
            rank=self.rank,
            world_size=self.world_size,
            timeout=_PATIENCE,
            device_id=device if is_cuda else None,
        )
        # The clock is read on the CPU, and must not wait for the GPU.
        self._clock = distributed.new_group(backend="gloo", timeout=_PATIENCE)

    def leave(self) -> None:
        """Part from the other ranks."""
        if self._clock is not None:
            distributed.destroy_process_group()
            self._clock = None

    def own_rows(self, rows: int) -> int:
        """This rank's share of a step's rows.

        Raises:
            ValueError: the ranks' shares would differ.
        """
        if rows % self.world_size:
            raise ValueError(f"{rows} rows do not split over {self.world_size} ranks")
        return rows // self.world_size

    def average(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its mean over the ranks, in place; queued, not waited for."""
        if self._clock is None:
            return
        for tensor in tensors:
            tensor.div_(self.world_size)
            distributed.all_reduce(tensor)

    def share(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors by those of rank 0, in place."""
        if self._clock is None:
            return
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)

    def share_pace(self, pace: Pace) -> Pace:
        """What rank 0's clock says."""
        if self._clock is None:
            return pace
        said = torch.tensor([float(value) for value in astuple(pace)], dtype=torch.float64)
        distributed.broadcast(said, src=0, group=self._clock)
        progress, *flags = said.tolist()
        return Pace(progress, *(bool(flag) for flag in flags))

    @torch.no_grad()
    def drift(self, tensors: Sequence[torch.Tensor]) -> float:
        """Largest difference of the tensors' sums between ranks; 0 when all hold the same bits."""
        if self._clock is None:
            return 0.0
        sums = torch.stack([tensor.double().sum() for tensor in tensors]).cpu()
        least, most = sums.clone(), sums.clone()
        distributed.all_reduce(least, distributed.ReduceOp.MIN, group=self._clock)
        distributed.all_reduce(most, distributed.ReduceOp.MAX, group=self._clock)
        return float((most - least).max())
