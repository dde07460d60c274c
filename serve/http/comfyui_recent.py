"""What pictures of lately accepted prompts carry, so that `/view` need not ask the store for it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from serve.http.comfyui_record import PromptRecord

MOST_CHARACTERS: Final = 4 << 20  # some thousands of workflows


class RecentTexts:
    """Text chunks of pictures, by tenant and job; of too many the oldest are forgotten.

    Args:
        most_characters: Of all texts together.
    """

    def __init__(self, most_characters: int = MOST_CHARACTERS) -> None:
        self._most_characters = most_characters
        self._texts: OrderedDict[tuple[str, str], dict[str, str]] = OrderedDict()
        self._characters = 0

    def keep(self, record: PromptRecord) -> None:
        """Keep what the pictures of a prompt's jobs carry."""
        self._forget(record)
        texts = record.png_text()
        for chain in record.chains:
            self._texts[record.tenant, chain.job] = texts
            self._characters += _length(texts)
        while self._characters > self._most_characters:
            _, oldest = self._texts.popitem(last=False)
            self._characters -= _length(oldest)

    def find(self, tenant: str, job_id: str) -> dict[str, str] | None:
        """Return keyword -> text of a tenant's job's pictures; None: it is not known here."""
        return self._texts.get((tenant, job_id))

    def _forget(self, record: PromptRecord) -> None:
        for chain in record.chains:
            self._characters -= _length(self._texts.pop((record.tenant, chain.job), {}))


def _length(texts: dict[str, str]) -> int:
    return sum(len(name) + len(text) for name, text in texts.items())
