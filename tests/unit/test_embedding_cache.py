"""The embedding cache forgets the least recently used and never holds more than it may."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deployments.embedding_cache import EmbeddingCache, entry_bytes
from deployments.payloads import PromptEmbedding, Stamp, TextJob


def job(number: int) -> TextJob:
    return TextJob(str(number), str(number), str(number), 48)


def embedding(size: int) -> PromptEmbedding:
    stamp = Stamp("r", 1, "fp32", 0.0, 0.1)
    return PromptEmbedding(np.zeros(size, np.uint16), np.zeros(0, np.uint16), (), stamp)


def test_only_the_very_same_text_is_found():
    cache = EmbeddingCache(10_000)
    kept = embedding(10)
    cache.put(TextJob("a", "a", "a", 48), kept)
    assert cache.get(TextJob("a", "a", "a", 48)) is kept
    # Every field that there is, those to come included.
    for name in (field.name for field in fields(TextJob)):
        other: Any = 49 if name == "max_sequence_length" else "b"
        assert cache.get(replace(TextJob("a", "a", "a", 48), **{name: other})) is None
    assert (cache.hits, cache.misses) == (1, len(fields(TextJob)))


def test_what_was_used_last_stays():
    cache = EmbeddingCache(3 * entry_bytes(job(1), embedding(10)))
    for number in (1, 2, 3):
        cache.put(job(number), embedding(10))
    assert cache.get(job(1)) is not None
    cache.put(job(4), embedding(10))
    assert cache.get(job(2)) is None
    assert cache.get(job(1)) is not None


def test_texts_count_for_the_bound():
    long = TextJob("字" * 10_000, "字" * 10_000, "", 48)
    cache = EmbeddingCache(100_000)
    for number in range(20):
        cache.put(TextJob(long.prompt + str(number), long.prompt_2, "", 48), embedding(1))
        assert cache.bytes <= 100_000
    assert entry_bytes(long, embedding(1)) > 40_000


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4000)), max_size=40))
def test_it_never_holds_more_than_it_may(puts: list[tuple[int, int]]):
    cache = EmbeddingCache(10_000)
    for number, size in puts:
        cache.put(job(number), embedding(size))
        held = {one: cache.get(job(one)) for one in range(10)}
        assert cache.bytes == sum(
            entry_bytes(job(one), found) for one, found in held.items() if found is not None
        )
        assert cache.bytes <= 10_000
