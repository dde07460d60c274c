"""Prompt embeddings by content: the same prompt is encoded once as long as it fits in memory.

A replica has one cache, as it has one set of encoders in one precision; what else an embedding
depends on is in its `TextJob`, which is the key.
"""

from __future__ import annotations

import sys
from collections import OrderedDict

from deployments.payloads import PromptEmbedding, TextJob

_OVERHEAD_BYTES = 1024  # of an entry: dictionary, objects and arrays around what is counted


class EmbeddingCache:
    """Least recently used out first, bounded by bytes: of embeddings, their texts and warnings."""

    def __init__(self, largest_bytes: int) -> None:
        self._largest_bytes = largest_bytes
        self._entries: OrderedDict[TextJob, PromptEmbedding] = OrderedDict()
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, job: TextJob) -> PromptEmbedding | None:
        """Return the embedding of this very text, or None."""
        entry = self._entries.get(job)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(job)
        return entry

    def put(self, job: TextJob, embedding: PromptEmbedding) -> None:
        """Remember an embedding; one larger than the whole cache is not kept."""
        size = entry_bytes(job, embedding)
        if size > self._largest_bytes or job in self._entries:
            return
        self._entries[job] = embedding
        self.bytes += size
        while self.bytes > self._largest_bytes:
            self.bytes -= entry_bytes(*self._entries.popitem(last=False))


def entry_bytes(job: TextJob, embedding: PromptEmbedding) -> int:
    """Return what remembering one prompt takes.

    Of a small model the longest texts outweigh their embedding: 10,000 characters for each encoder,
    up to 4 bytes each. A text that the encoders share counts once for each of them.
    """
    texts = (job.prompt, job.prompt_2, job.prompt_3, *embedding.warnings)
    return (
        _OVERHEAD_BYTES
        + embedding.prompt_embeds.nbytes
        + embedding.pooled_prompt_embeds.nbytes
        + sum(map(sys.getsizeof, texts))
    )
