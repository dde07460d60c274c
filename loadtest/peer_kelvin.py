"""Kelvin's three stages in one process, without Ray and HTTP: the served parts, wired in threads.

As served, prompts that wait together are encoded together and equal ones once, pictures join and
leave the engine's batch at any step, and each is decoded as soon as it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from deployments.embedding_cache import EmbeddingCache
from deployments.engine import Engine
from deployments.payloads import (
    DenoiseEvent,
    DenoiseJob,
    Latents,
    PromptEmbedding,
    Stamp,
    StepProgress,
    TextJob,
)
from deployments.sd3.mmdit import Mmdit
from deployments.sd3.text import TextEncoders
from deployments.sd3.vae import VaeDecoder
from deployments.warm_up import warm_up
from loadtest.peer_pipelines import Picture
from loadtest.peer_settings import PictureAsked

_TOGETHER = 8  # prompts, as in deployments.text_encoder
_CACHE_BYTES = 256 << 20
_LONGEST_S = 600.0
_NOBODY = Stamp(replica="", pid=0, precision="", queue_s=0.0, seconds=0.0)


class KelvinArm:
    """Makes pictures; any number at once.

    Args:
        text: The encoders.
        mmdit: The transformer.
        vae: The decoder.
        side: pixels, that everything is made ready for.
        text_tokens: Of a prompt's embedding.
        max_waiting: Pictures that may be asked for at once.
        shift: Of the schedule.
    """

    def __init__(
        self,
        text: TextEncoders,
        mmdit: Mmdit,
        vae: VaeDecoder,
        *,
        side: int,
        text_tokens: int,
        max_waiting: int = 64,
        shift: float = 3.0,
    ) -> None:
        self._text, self._mmdit, self._vae = text, mmdit, vae
        self._side, self._text_tokens = side, text_tokens
        self._max_waiting, self._shift = max_waiting, shift
        self._cache = EmbeddingCache(_CACHE_BYTES)
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._decoding = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._engine: Engine | None = None

    @property
    def weights_bytes(self) -> int:
        """Of all its models."""
        return self._text.resident_bytes + self._mmdit.resident_bytes + self._vae.resident_bytes

    def prepare(self) -> dict[str, Any]:
        """Make ready, as replicas do at start-up, and say what came of it."""
        warmed = warm_up(self._mmdit, ((self._side, self._side),), self._text_tokens)
        decoding = self._vae.prepare(self._side // 8, self._side // 8)
        self._engine = Engine(
            self._mmdit,
            max_waiting=self._max_waiting,
            costs=warmed.costs,
            memory=warmed.memory,
            prepared_rows=warmed.prepared_rows,
        )
        side = self._side // 8
        return {
            "precision": self._mmdit.precision.label,
            "attention": self._mmdit.attention_backend(side, side, self._text_tokens, 2),
            "prepared_rows": list(warmed.prepared_rows.values()),
            "decoding": None if decoding is None else decoding.reason,
        }

    def make(self, asked: Sequence[PictureAsked]) -> list[Picture]:
        """Make pictures, uint8 [height, width, 3], in the order they are asked for."""
        pictures: list[Future[Picture]] = [Future() for _ in asked]
        for begin in range(0, len(asked), _TOGETHER):
            part = slice(begin, begin + _TOGETHER)
            self._encoding.submit(self._begin, asked[part], pictures[part])
        return [each.result(_LONGEST_S) for each in pictures]

    def close(self) -> None:
        """Stop the threads and let go of everything."""
        for pool in (self._encoding, self._decoding):
            pool.shutdown()
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        del self._text, self._mmdit, self._vae

    def _begin(self, asked: Sequence[PictureAsked], pictures: Sequence[Future[Picture]]) -> None:
        """Encode some prompts and give their pictures to the engine."""
        try:
            assert self._engine is not None, "prepare comes first"
            texts = [(_job(each.prompt, each), _job("", each)) for each in asked]
            known = self._encoded([job for pair in texts for job in pair])
            for each, (positive, negative), picture in zip(asked, texts, pictures, strict=True):
                job = self._denoise_job(each, known[positive], known[negative])
                self._engine.submit(job, self._listener(picture))
        except Exception as error:
            for picture in pictures:
                if not picture.done():
                    picture.set_exception(error)

    def _encoded(self, jobs: Sequence[TextJob]) -> dict[TextJob, PromptEmbedding]:
        known = {job: found for job in set(jobs) if (found := self._cache.get(job)) is not None}
        new = list(dict.fromkeys(job for job in jobs if job not in known))
        for job, prompt in zip(new, self._text.encode(new) if new else [], strict=True):
            known[job] = PromptEmbedding(
                prompt.prompt_embeds, prompt.pooled_prompt_embeds, prompt.warnings, _NOBODY
            )
            self._cache.put(job, known[job])
        return known

    def _denoise_job(
        self, asked: PictureAsked, positive: PromptEmbedding, negative: PromptEmbedding
    ) -> DenoiseJob:
        return DenoiseJob(
            job_id=f"picture-{asked.seed}",
            image=0,
            width=asked.side,
            height=asked.side,
            num_inference_steps=asked.steps,
            guidance_scale=asked.guidance_scale,
            sampler="euler",
            scheduler="normal",
            shift=self._shift,
            seed=asked.seed,
            positive=positive,
            negative=negative,
        )

    def _listener(self, picture: Future[Picture]) -> Any:
        def on_event(event: DenoiseEvent | BaseException) -> None:
            if isinstance(event, Latents):
                self._decoding.submit(self._decode, event, picture)
            elif isinstance(event, BaseException):
                picture.set_exception(event)
            elif not isinstance(event, StepProgress):
                picture.set_exception(RuntimeError("the engine handed the picture back"))

        return on_event

    def _decode(self, latents: Latents, picture: Future[Picture]) -> None:
        try:
            picture.set_result(self._vae.decode(latents.latents))
        except Exception as error:
            picture.set_exception(error)


def _job(prompt: str, asked: PictureAsked) -> TextJob:
    return TextJob(prompt, prompt, prompt, asked.max_sequence_length)
