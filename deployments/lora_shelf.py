"""Which LoRAs a denoiser holds, who uses them, and what makes room for what.

Requests name files; a file takes pages of the model's arena (`deployments.sd3.lora_arena`), once,
however many requests use it. What is in use is never put out; a request whose files find no pages
waits until others end. Files are read and copied by a thread of their own, beside the forwards.

Only the first of those that wait has a claim: files it needs stay once they are there, so nobody
starves and no two wait for each other. Files of those behind it are read ahead into pages that
nobody uses.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from deployments.payloads import LoraUse
from deployments.sd3.lora_arena import HostPage
from deployments.sd3.lora_layers import PAGE_RANKS, PageUse
from serve.errors import InvalidRequest, KelvinError, StageFailed

_Key = tuple[str, str]  # name and version

_log = logging.getLogger(__name__)


class LoraSource(Protocol):
    """Where files come from. Both raise KelvinError where a file cannot be used."""

    def pages(self, use: LoraUse) -> int:
        """Return the pages that a file takes, from its header."""

    def read(self, use: LoraUse) -> Sequence[HostPage]:
        """Return the content of a file's pages."""


class Arena(Protocol):
    """Where pages are; `deployments.sd3.lora_arena.LoraArena` is one."""

    pages: int
    most_a_row: int

    def write(self, page: int, content: HostPage) -> None:
        """Fill a page that no row uses."""


@dataclass
class _File:
    use: LoraUse  # its weight is of no account
    pages: tuple[int, ...]
    users: int = 0
    is_there: bool = False
    failure: KelvinError | None = None


class LoraShelf:
    """Holds files for requests.

    Args:
        arena: Of the model.
        source: Of the files.
        on_change: Called, by any thread and under no lock, when a file is there or has failed.
    """

    def __init__(
        self, arena: Arena, source: LoraSource, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self.on_change = on_change
        self._arena = arena
        self._source = source
        self._changed = threading.Condition()
        self._free = list(range(arena.pages))
        self._files: OrderedDict[_Key, _File] = OrderedDict()  # least recently used first
        self._sizes: dict[_Key, int] = {}
        self._wanted: OrderedDict[int, tuple[LoraUse, ...]] = OrderedDict()  # by who waits
        self._holders: dict[int, list[_Key]] = {}
        self._claimant: int | None = None
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def check(self, uses: Sequence[LoraUse]) -> None:
        """Refuse what could never be held; reads headers, so not for an event loop.

        Raises:
            KelvinError: A file cannot be used.
            InvalidRequest: Together they are larger than this denoiser's room.
        """
        pages = sum(self._size(use) for use in uses)
        most = min(self._arena.most_a_row, self._arena.pages)
        if pages > most:
            ranks = PAGE_RANKS * pages
            raise InvalidRequest(
                f"The LoRAs of the request have {ranks} ranks together, each counted in sixteens.",
                field="loras",
                value=", ".join(use.name for use in uses),
                allowed=f"at most {PAGE_RANKS * most} ranks (lora.ranks)",
            )

    def want(self, holder: int, uses: Sequence[LoraUse]) -> None:
        """Note who waits, so that its files are read ahead; they were checked."""
        with self._changed:
            if holder not in self._wanted:
                self._wanted[holder] = tuple(uses)
                self._start()
                self._changed.notify_all()

    def hold(self, holder: int) -> bool:
        """Try to hold all that a waiting request wants; only its first failure stops it later.

        To be asked for the first of those that wait until it may start, then for the next.

        Returns:
            True once it has them all, or one of them failed: `pages` says which.
        """
        with self._changed:
            uses = self._wanted[holder]
            if self._claimant not in (None, holder):
                self._let_go(self._claimant)  # somebody came before it
            self._claimant = holder
            held = self._holders.setdefault(holder, [])
            for use in uses:
                file = self._files.get(_key(use))
                if file is not None and file.failure is not None:
                    break
                if file is not None and _key(use) not in held:
                    file.users += 1
                    held.append(_key(use))
                    self._files.move_to_end(_key(use))
            else:
                keys = {_key(use) for use in uses}
                if len(held) < len(keys) or not all(self._files[key].is_there for key in held):
                    self._changed.notify_all()
                    return False
            return True

    def pages(self, holder: int, uses: Sequence[LoraUse]) -> tuple[PageUse, ...]:
        """Return the pages of what is held, each with its weight.

        Raises:
            KelvinError: A file could not be read; it is tried again for the next who wants it.
        """
        with self._changed:
            self._begun(holder)
            found: list[PageUse] = []
            for use in uses:
                file = self._files[_key(use)]
                if file.failure is not None:
                    self._forget(_key(use))
                    raise file.failure
                found += [(page, use.weight) for page in file.pages]
            return tuple(found)

    def release(self, holder: int) -> None:
        """Let go of what a request held or waited for."""
        with self._changed:
            self._begun(holder)
            self._let_go(holder)
            self._changed.notify_all()

    @property
    def ranks(self) -> int:
        """Ranks that there is room for."""
        return PAGE_RANKS * self._arena.pages

    def held(self) -> tuple[str, ...]:
        """Return the names of the files that are at hand, most recently used first."""
        with self._changed:
            there = [key[0] for key, file in reversed(self._files.items()) if file.is_there]
            return tuple(dict.fromkeys(there))

    def close(self) -> None:
        """Read nothing more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _size(self, use: LoraUse) -> int:
        key = _key(use)
        if key not in self._sizes:
            self._sizes[key] = self._source.pages(use)
        return self._sizes[key]

    def _start(self) -> None:
        if self._thread is None and not self._is_closed:
            self._thread = threading.Thread(target=self._run, name="lora-reader", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                while (file := self._next()) is None and not self._is_closed:
                    self._changed.wait()
            if file is None:
                return
            failure: KelvinError | None = None
            try:
                contents = self._source.read(file.use)
                if len(contents) > len(file.pages):
                    raise StageFailed(f"LoRA {file.use.name!r} has changed while it was read.")
                for page, content in zip(file.pages, contents, strict=False):
                    self._arena.write(page, content)
            except KelvinError as error:
                failure = error
            except Exception as error:
                _log.exception("reading a LoRA failed")
                failure = StageFailed(f"LoRA {file.use.name!r}: {type(error).__name__}: {error}")
            with self._changed:
                if failure is None:
                    # Its header may promise more ranks than it has.
                    self._free += file.pages[len(contents) :]
                    file.pages = file.pages[: len(contents)]
                file.failure, file.is_there = failure, failure is None
            self.on_change()

    def _next(self) -> _File | None:
        """Give the next file pages and return it; None where nothing is wanted or has room."""
        for holder in sorted(self._wanted, key=lambda waits: waits != self._claimant):
            for use in self._wanted[holder]:
                if _key(use) not in self._files:
                    pages = self._room(self._sizes[_key(use)], claims=holder == self._claimant)
                    if pages is not None:
                        self._files[_key(use)] = _File(use, pages)
                        return self._files[_key(use)]
        return None

    def _room(self, count: int, *, claims: bool) -> tuple[int, ...] | None:
        """Return so many pages, putting out what nobody uses; a claim also what others want."""
        wanted = [
            uses for holder, uses in self._wanted.items() if not claims or holder == self._claimant
        ]
        kept = {_key(use) for uses in wanted for use in uses}
        idle = [
            key
            for key, file in self._files.items()
            if not file.users and (file.is_there or file.failure) and key not in kept
        ]
        if len(self._free) + sum(len(self._files[key].pages) for key in idle) < count:
            return None
        others = {_key(use) for uses in self._wanted.values() for use in uses}
        idle.sort(key=lambda key: key in others)
        while len(self._free) < count:
            self._forget(idle.pop(0))
        pages, self._free = self._free[:count], self._free[count:]
        return tuple(pages)

    def _forget(self, key: _Key) -> None:
        self._free += self._files.pop(key).pages
        for held in self._holders.values():
            if key in held:
                held.remove(key)

    def _begun(self, holder: int) -> None:
        self._wanted.pop(holder, None)
        if self._claimant == holder:
            self._claimant = None

    def _let_go(self, holder: int | None) -> None:
        if holder is not None:
            for key in self._holders.pop(holder, ()):
                self._files[key].users -= 1


def _key(use: LoraUse) -> _Key:
    return use.name, use.version
