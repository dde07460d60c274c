"""Prompt embeddings by content: the same prompt is encoded once as long as it fits in memory."""

from __future__ import annotations

from collections import OrderedDict

from deployments.payloads import PromptEmbedding, TextJob


class EmbeddingCache:
    """Least recently used out first, bounded by bytes."""

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
        size = _size(embedding)
        if size > self._largest_bytes or job in self._entries:
            return
        self._entries[job] = embedding
        self.bytes += size
        while self.bytes > self._largest_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.bytes -= _size(oldest)


def _size(embedding: PromptEmbedding) -> int:
    return embedding.prompt_embeds.nbytes + embedding.pooled_prompt_embeds.nbytes
