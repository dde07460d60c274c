"""Scenes and tokenised captions from worker processes, in an order fixed by the seed.

Chunk ``k`` is made by worker ``k % workers`` from a generator seeded with ``(seed, name, k)``
and taken in that order, so what a training step sees does not depend on how fast workers are.
A chunk holds one frame size; scenes travel as plain objects and are drawn on the GPU.
"""

import multiprocessing
import os
import queue
import random
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import numpy.typing as npt

from deployments.builtin.sample import Kind, sample_example
from deployments.builtin.scene import Scene

_POLL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """What a stream of examples is made of.

    Attributes:
        seed: of everything in it.
        name: tells the streams of one run apart.
        chunk: examples in a chunk.
        sizes: (height, width) in pixels and the weight of each.
        kinds: kinds of ``sample_example`` and the weight of each.
        clip_length: tokens of a CLIP prompt.
        t5_length: tokens of a T5 prompt.
        sentence_case: share of prompts that get a capital letter in front, as people type them.
        full_stop: share that get a full stop at the end.
        start: first chunk to make.
    """

    seed: int
    name: str
    chunk: int
    sizes: tuple[tuple[tuple[int, int], float], ...]
    kinds: tuple[tuple[Kind, float], ...]
    clip_length: int
    t5_length: int
    sentence_case: float = 0.12
    full_stop: float = 0.08
    start: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Examples of one frame size.

    Attributes:
        index: place in the stream.
        size: (height, width) in pixels.
        scenes: what to draw.
        clip_ids: int16 [examples, clip_length].
        t5_ids: int16 [examples, t5_length].
    """

    index: int
    size: tuple[int, int]
    scenes: list[Scene]
    clip_ids: npt.NDArray[np.int16]
    t5_ids: npt.NDArray[np.int16]


def chunk_size(settings: StreamSettings, index: int) -> tuple[int, int]:
    """Frame size of one chunk: every size once at first, then by weight."""
    if index < len(settings.sizes):
        return settings.sizes[index][0]
    rng = random.Random(f"{settings.seed}:{settings.name}:size:{index}")
    return rng.choices(
        [size for size, _ in settings.sizes], [weight for _, weight in settings.sizes]
    )[0]


def _typed(prompt: str, settings: StreamSettings, rng: random.Random) -> str:
    if prompt and rng.random() < settings.sentence_case:
        prompt = prompt[0].upper() + prompt[1:]
    if prompt and rng.random() < settings.full_stop:
        prompt += "."
    return prompt


class ChunkMaker:
    """Makes chunks in this process; the tokenizers are built once."""

    def __init__(self, settings: StreamSettings) -> None:
        from deployments.builtin.grammar_tokenizers import build_clip_tokenizer, build_t5_tokenizer

        self.settings = settings
        self.clip = build_clip_tokenizer(settings.clip_length)
        self.t5 = build_t5_tokenizer(settings.t5_length)

    def make(self, index: int) -> Chunk:
        """Chunk ``index`` of the stream."""
        settings = self.settings
        rng = random.Random(f"{settings.seed}:{settings.name}:{index}")
        height, width = chunk_size(settings, index)
        kinds = rng.choices(
            [kind for kind, _ in settings.kinds],
            [weight for _, weight in settings.kinds],
            k=settings.chunk,
        )
        examples = [sample_example(rng, kind, "train", height, width) for kind in kinds]
        prompts = [_typed(example.prompt, settings, rng) for example in examples]
        return Chunk(
            index=index,
            size=(height, width),
            scenes=[example.scene for example in examples],
            clip_ids=_ids(self.clip, prompts, settings.clip_length),
            t5_ids=_ids(self.t5, prompts, settings.t5_length),
        )


def _ids(tokenizer: Any, prompts: list[str], length: int) -> npt.NDArray[np.int16]:
    batch = tokenizer(prompts, padding="max_length", max_length=length, truncation=True)
    return np.asarray(batch["input_ids"], dtype=np.int16)


def _work(settings: StreamSettings, worker: int, workers: int, out: Any) -> None:
    try:
        maker = ChunkMaker(settings)
        index = settings.start + worker
        while True:
            out.put(maker.make(index))
            index += workers
    except Exception:  # the text crosses the process boundary, the trainer raises it
        out.put(traceback.format_exc())


class ExampleStream:
    """Chunks in order, made ahead by worker processes.

    Workers are spawned, not forked: the trainer holds a CUDA context. With no workers the chunks
    are made in this process, which is what tests use.
    """

    def __init__(self, settings: StreamSettings, workers: int, ahead: int = 3) -> None:
        self.settings = settings
        self._processes: list[BaseProcess] = []
        self._queues: list[Any] = []
        self._next = settings.start
        self._maker = ChunkMaker(settings) if workers == 0 else None
        context = multiprocessing.get_context("spawn")
        threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        before = {name: os.environ.get(name) for name in threads}
        os.environ.update(threads)
        try:
            for worker in range(workers):
                out = context.Queue(maxsize=ahead)
                process = context.Process(
                    target=_work, args=(settings, worker, workers, out), daemon=True
                )
                process.start()
                self._queues.append(out)
                self._processes.append(process)
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            yield self.take()

    def take(self) -> Chunk:
        """The next chunk; waits for its worker.

        Raises:
            RuntimeError: a worker failed or died.
        """
        if self._maker is not None:
            chunk = self._maker.make(self._next)
            self._next += 1
            return chunk
        worker = (self._next - self.settings.start) % len(self._queues)
        self._next += 1
        while True:
            try:
                item = self._queues[worker].get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if not self._processes[worker].is_alive():
                    raise RuntimeError(f"data worker {worker} died") from None
                continue
            if isinstance(item, str):
                raise RuntimeError(f"data worker {worker} failed:\n{item}")
            return item  # type: ignore[no-any-return]

    def close(self) -> None:
        """Stop the workers."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(timeout=5)
        for out in self._queues:
            out.cancel_join_thread()
            out.close()
