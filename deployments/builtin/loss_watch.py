"""Watches the loss of a training loop, and goes back to good weights when it breaks."""

import math
import time
from collections.abc import Callable

import torch

from deployments.builtin.training_log import Budget, TrainingLog

_MAX_RESTORES = 8
_RESTORE_DAMPING = 0.7
_REPORT_SECONDS = 5.0


class Snapshot:
    """Copies of live tensors, to go back to when a loss stops being finite."""

    def __init__(self, live: list[torch.Tensor]) -> None:
        self._live = live
        self._copies = [tensor.detach().clone() for tensor in live]

    @torch.no_grad()
    def take(self) -> None:
        """Remember the tensors as they are."""
        torch._foreach_copy_(self._copies, self._live)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the remembered values back."""
        torch._foreach_copy_(self._live, self._copies)


class LossWatch:
    """Adds losses up on the device, reports now and then, and goes back when one is not finite.

    Reading a loss waits for the GPU, so it happens every few seconds only.

    Args:
        live: every tensor that a step changes.
        log: where windows are reported.
        budget: of the loop.
        batch: rows in a step.
    """

    def __init__(
        self, live: Callable[[], list[torch.Tensor]], log: TrainingLog, budget: Budget, batch: int
    ) -> None:
        self._live, self._log, self._budget, self._batch = live, log, budget, batch
        self.damping, self.restores, self.waited = 1.0, 0, 0.0
        device = live()[0].device
        self._sum = torch.zeros((), device=device)
        self._norm = torch.zeros((), device=device)
        self._snapshot: Snapshot | None = None
        self.restart()

    def restart(self) -> None:
        """Begin a new window."""
        self._sum.zero_()
        self._steps, self.waited, self._began = 0, 0.0, time.monotonic()

    def add(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Take in one step."""
        self._sum += loss
        self._norm = norm
        self._steps += 1

    @property
    def due(self) -> bool:
        """Whether it is time to report."""
        return self._snapshot is None or time.monotonic() - self._began > _REPORT_SECONDS

    def report(self, step: int, factor: float, progress: float) -> None:
        """Log the window.

        Raises:
            FloatingPointError: the loss is not finite and going back has not helped.
        """
        if self._steps == 0:
            return
        loss, norm = float(self._sum.item()) / self._steps, float(self._norm.item())
        seconds = max(time.monotonic() - self._began, 1e-6)
        self._log.write(
            "flow",
            step=step,
            loss=loss,
            norm=norm,
            factor=factor,
            ms_per_step=1000 * seconds / self._steps,
            samples_per_s=self._steps * self._batch / seconds,
            waited_s=self.waited,
            elapsed_s=self._budget.elapsed_seconds,
            left_s=(1 - progress) * self._budget.elapsed_seconds / max(progress, 1e-6),
        )
        if math.isfinite(loss) and math.isfinite(norm):
            if self._snapshot is None:
                self._snapshot = Snapshot(self._live())
            self._snapshot.take()
        elif self._snapshot is None or self.restores >= _MAX_RESTORES:
            raise FloatingPointError(f"the loss is {loss} at step {step}")
        else:
            self._snapshot.restore()
            self.restores += 1
            self.damping *= _RESTORE_DAMPING
            self._log.write("restored", step=step, damping=self.damping)
        self.restart()
