"""The embedding cache forgets the least recently used and never holds more than it may."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deployments.embedding_cache import EmbeddingCache
from deployments.payloads import PromptEmbedding, Stamp, TextJob


def job(number: int) -> TextJob:
    return TextJob(str(number), str(number), str(number), 48)


def embedding(size: int) -> PromptEmbedding:
    stamp = Stamp("r", 1, "fp32", 0.0, 0.1)
    return PromptEmbedding(np.zeros(size, np.uint16), np.zeros(0, np.uint16), (), stamp)


def test_only_the_very_same_text_is_found():
    cache = EmbeddingCache(1000)
    kept = embedding(10)
    cache.put(TextJob("a", "a", "a", 48), kept)
    assert cache.get(TextJob("a", "a", "a", 48)) is kept
    for other in (
        TextJob("b", "a", "a", 48),
        TextJob("a", "b", "a", 48),
        TextJob("a", "a", "b", 48),
        TextJob("a", "a", "a", 49),
    ):
        assert cache.get(other) is None
    assert (cache.hits, cache.misses) == (1, 4)


def test_what_was_used_last_stays():
    cache = EmbeddingCache(60)
    for number in (1, 2, 3):
        cache.put(job(number), embedding(10))
    assert cache.get(job(1)) is not None
    cache.put(job(4), embedding(10))
    assert cache.get(job(2)) is None
    assert cache.get(job(1)) is not None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 120)), max_size=40))
def test_it_never_holds_more_than_it_may(puts: list[tuple[int, int]]):
    cache = EmbeddingCache(200)
    for number, size in puts:
        cache.put(job(number), embedding(size))
        held = [cache.get(job(one)) for one in range(10)]
        assert cache.bytes == sum(one.prompt_embeds.nbytes for one in held if one is not None)
        assert cache.bytes <= 200
