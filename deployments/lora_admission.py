"""Who may start, by the LoRAs that it needs; without a shelf only who needs none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deployments.lora_shelf import LoraShelf
from deployments.payloads import LoraUse
from deployments.sd3.lora_layers import PageUse
from deployments.ticket import Ticket
from serve.errors import InvalidRequest


class LoraAdmission:
    """What the engine asks about its requests' LoRAs.

    Args:
        shelf: That holds them; None: the model takes none.
        on_change: Called, by any thread, when a file has come or failed.
    """

    def __init__(self, shelf: LoraShelf | None, on_change: Callable[[], None]) -> None:
        self._shelf = shelf
        if shelf is not None:
            shelf.on_change = on_change

    @property
    def may_hold_up(self) -> bool:
        """Whether a request may wait for a file."""
        return self._shelf is not None

    def check(self, uses: Sequence[LoraUse]) -> None:
        """Refuse what could never be held; reads headers, so not for an event loop.

        Raises:
            InvalidRequest: There is no room for any, or not for these together.
            KelvinError: A file cannot be used.
        """
        if not uses:
            return
        if self._shelf is None:
            raise InvalidRequest(
                "This denoiser has no room for LoRAs.",
                field="loras",
                value=", ".join(use.name for use in uses),
                allowed="none; lora.ranks gives it room",
            )
        self._shelf.check(uses)

    def may_start(self) -> Callable[[Ticket], bool]:
        """Return what says, asked in order, who need not wait for a LoRA.

        Whoever needs one does not overtake another who does; whoever needs none may.
        """
        somebody_waits = False

        def may_start(ticket: Ticket) -> bool:
            nonlocal somebody_waits
            if not ticket.job.loras or self._shelf is None:
                return True
            self._shelf.want(ticket.key, ticket.job.loras)
            somebody_waits = somebody_waits or not self._shelf.hold(ticket.key)
            return not somebody_waits

        return may_start

    def pages(self, ticket: Ticket) -> tuple[PageUse, ...]:
        """Return the pages that adapt the rows of who may start.

        Raises:
            KelvinError: A file could not be read.
        """
        if not ticket.job.loras or self._shelf is None:
            return ()
        return self._shelf.pages(ticket.key, ticket.job.loras)

    def release(self, ticket: Ticket) -> None:
        """Let go of what a request held or waited for."""
        if self._shelf is not None:
            self._shelf.release(ticket.key)

    def close(self) -> None:
        """Read nothing more."""
        if self._shelf is not None:
            self._shelf.close()
