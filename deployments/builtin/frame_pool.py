"""A ring of ready training rows on the device, so that the GPU never waits for Python.

Drawing and encoding happen once for a chunk of examples, on a stream of their own; each row is
then drawn several times with other noise and times before newer rows replace it.
"""

from collections.abc import Callable

import numpy.typing as npt
import torch

from deployments.builtin.example_stream import Chunk

# Largest batch that is drawn at once: the canvas and its blending take about 10 MB a scene.
_DRAW_BATCH = 128


class FramePool:
    """Rows of one frame size: an array per example and both prompts' tokens.

    Args:
        capacity: rows kept.
        row_shape: of one row's array.
        dtype: of the arrays.
        clip_length: tokens of a CLIP prompt.
        t5_length: tokens of a T5 prompt.
        device: where rows are.
    """

    def __init__(
        self,
        capacity: int,
        row_shape: tuple[int, ...],
        dtype: torch.dtype,
        clip_length: int,
        t5_length: int,
        device: torch.device,
    ) -> None:
        self.rows = torch.zeros((capacity, *row_shape), dtype=dtype, device=device)
        self.clip_ids = torch.zeros((capacity, clip_length), dtype=torch.int64, device=device)
        self.t5_ids = torch.zeros((capacity, t5_length), dtype=torch.int64, device=device)
        self.filled = 0
        self._cursor = 0

    @property
    def capacity(self) -> int:
        """Rows that fit."""
        return int(self.rows.shape[0])

    def place(self, count: int) -> slice:
        """Where the next ``count`` rows go; the ring holds whole chunks only.

        Raises:
            ValueError: the capacity is no multiple of ``count``.
        """
        if self.capacity % count:
            raise ValueError(f"a ring of {self.capacity} rows cannot hold chunks of {count}")
        place = slice(self._cursor, self._cursor + count)
        self._cursor = (self._cursor + count) % self.capacity
        self.filled = max(self.filled, place.stop)
        return place

    def sample(
        self, count: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``count`` rows drawn with replacement: arrays, CLIP ids, T5 ids."""
        chosen = torch.randint(self.filled, (count,), generator=generator, device=self.rows.device)
        return self.rows[chosen], self.clip_ids[chosen], self.t5_ids[chosen]


class PoolFiller:
    """Draws chunks into pools beside the training stream.

    On a GPU the work runs on a stream of its own; copies from pageable memory then wait for that
    stream only. A chunk overwrites rows only after the steps that were queued before it.

    Args:
        pools: by frame size.
        device: where drawing happens.
        encode: from uint8 frames [n, 3, height, width] to rows.
    """

    def __init__(
        self,
        pools: dict[tuple[int, int], FramePool],
        device: torch.device,
        encode: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.pools = pools
        self.device = device
        self.encode = encode
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream() if is_cuda else None  # type: ignore[no-untyped-call]

    def put(self, chunk: Chunk) -> None:
        """Draw, encode and store one chunk."""
        if self._stream is None:
            self._store(chunk, self._rows(chunk), None)
            return
        training = torch.cuda.current_stream()
        before = training.record_event()
        with torch.cuda.stream(self._stream):
            self._store(chunk, self._rows(chunk), before)
            after = self._stream.record_event()
        training.wait_event(after)

    @torch.no_grad()
    def _rows(self, chunk: Chunk) -> list[torch.Tensor]:
        from deployments.builtin.world import draw

        return [
            self.encode(draw(chunk.scenes[start : start + _DRAW_BATCH], self.device))
            for start in range(0, len(chunk.scenes), _DRAW_BATCH)
        ]

    def _store(
        self, chunk: Chunk, rows: list[torch.Tensor], before: torch.cuda.Event | None
    ) -> None:
        pool = self.pools[chunk.size]
        clip_ids, t5_ids = self._ids(chunk.clip_ids), self._ids(chunk.t5_ids)
        if before is not None and self._stream is not None:
            self._stream.wait_event(before)
        place = pool.place(len(chunk.scenes))
        pool.rows[place] = torch.cat(rows).to(pool.rows.dtype)
        pool.clip_ids[place] = clip_ids
        pool.t5_ids[place] = t5_ids

    def _ids(self, ids: npt.NDArray) -> torch.Tensor:  # type: ignore[type-arg]
        return torch.from_numpy(ids).to(self.device).long()
