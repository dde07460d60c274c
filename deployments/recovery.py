"""What an error in the engine means, and whom it concerns.

A lost card concerns everything it held and is not caught here: the engine ends, and its requests
are tried elsewhere. Memory that ran out concerns nobody yet: fewer rows are tried, then one request
alone, a few times, while others go on. Anything else concerns one request, found by running each
alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from deployments.device_errors import first_line, is_out_of_memory, is_sticky
from deployments.live_request import LiveRequest
from deployments.memory_budget import MemoryBudget
from deployments.ticket import Ticket
from serve.errors import KelvinError, StageFailed, StageUnavailable

# Of one request alone, or of its admission, before it is given up for want of memory.
_TRIES = 3
# Before the next try where no other request's forward passes the time.
_PAUSE_S = 0.1

_log = logging.getLogger(__name__)


def caught(error: Exception) -> Exception:
    """Return an error to deal with later, without the tensors that its frames hold.

    Raises:
        Exception: The error itself, if the card is lost.
    """
    if is_sticky(error):
        raise error
    return error.with_traceback(None) if is_out_of_memory(error) else error


def told(error: Exception) -> KelvinError:
    """Return what the request that an error concerns is told.

    Raises:
        Exception: The error itself, if the card is lost.
    """
    if isinstance(error, KelvinError):
        return error
    if is_sticky(error):
        raise error
    _log.error("denoising failed", exc_info=error)
    return StageFailed(f"The denoiser failed: {type(error).__name__}: {error}")


class Recovery:
    """Decides what is tried after an error.

    Args:
        device: Of the model.
        memory: Told what did not fit.
        drop: Ends a request with an error.
        live: Returns the number of live requests.
        pause: Waits some seconds, or less if there is news.
    """

    def __init__(
        self,
        device: torch.device,
        memory: MemoryBudget,
        *,
        drop: Callable[[Ticket, KelvinError], None],
        live: Callable[[], int],
        pause: Callable[[float], None],
    ) -> None:
        self._device = device
        self._memory = memory
        self._drop = drop
        self._live = live
        self._pause = pause
        self._tries: dict[int, int] = {}
        self._resting: set[int] = set()

    def ready(self, live: Sequence[LiveRequest]) -> Sequence[LiveRequest]:
        """Return whose turn it may be: who found no memory lets others go first."""
        awake = [each for each in live if each.ticket.key not in self._resting]
        return awake or live

    def went_well(self, chosen: Sequence[LiveRequest]) -> None:
        """Note that a forward fitted."""
        self._memory.went_well()
        self._resting.clear()
        for each in chosen:
            self._tries.pop(each.ticket.key, None)

    def forget(self, ticket: Ticket) -> None:
        """Drop a request that has ended."""
        self._tries.pop(ticket.key, None)
        self._resting.discard(ticket.key)

    def smaller(
        self, chosen: Sequence[LiveRequest], rows: int, failure: Exception
    ) -> list[Sequence[LiveRequest]]:
        """Return the forwards to run instead of one that failed; those left out keep their turn.

        Args:
            chosen: Whose rows it had.
            rows: How many.
            failure: As `caught` returned it.
        """
        if is_out_of_memory(failure):
            _log.warning("no memory for a forward of %d rows of %s", rows, chosen[0].shape)
            self._memory.ran_out(chosen[0].shape, rows)
            self._empty_cache()
            if len(chosen) > 1:
                return [chosen[: len(chosen) // 2]]
            self._found_no_memory(chosen[0].ticket, failure, others=self._live() - 1)
            return []
        if len(chosen) > 1:
            return [[each] for each in chosen]
        self._drop(chosen[0].ticket, told(failure))
        return []

    def not_admitted(self, ticket: Ticket, failure: Exception) -> None:
        """Let a request that could not become live wait on, or drop it.

        Args:
            ticket: Still among those that wait.
            failure: As `caught` returned it.
        """
        if not is_out_of_memory(failure):
            self._drop(ticket, told(failure))
            return
        self._empty_cache()
        self._found_no_memory(ticket, failure, others=self._live())

    def _found_no_memory(self, ticket: Ticket, failure: Exception, others: int) -> None:
        tries = self._tries[ticket.key] = self._tries.get(ticket.key, 0) + 1
        if tries < _TRIES:
            self._resting.add(ticket.key)
            if not others:
                self._pause(_PAUSE_S)
        elif others:
            self._drop(
                ticket, StageUnavailable(f"No memory beside other requests: {first_line(failure)}")
            )
        else:
            self._drop(
                ticket,
                StageFailed(f"Not even one request of this size fits: {first_line(failure)}"),
            )

    def _empty_cache(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
