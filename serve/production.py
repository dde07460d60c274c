"""One job from resolved request to stored pictures, without its journal.

Pictures of one job are denoised one by one, in as many calls: replicas share them, and picture i is
the picture that its seed gives alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from opentelemetry.trace import SpanKind

from deployments.payloads import (
    EncodedImage,
    PromptEmbedding,
    Stamp,
    StepProgress,
)
from serve import telemetry
from serve.fair_share import FairShare
from serve.inputs import Inputs
from serve.jobs import JobJournal
from serve.loras import LoraLibrary, LoraUses
from serve.pictures import EXTENSIONS, encode_picture, prompts_fit
from serve.pipeline_identity import PipelineIdentity
from serve.previews import preview_text
from serve.requests import (
    LARGEST_SEED,
    ForwardPath,
    GenerateRequest,
    GenerateResult,
    ImageRef,
    JobEvent,
)
from serve.running import RunningJob
from serve.spool import MadePicture
from serve.stage_jobs import Given, denoise_job, text_jobs
from serve.stage_reports import denoise_report, report, sum_of, text_report
from serve.stages import Stages
from serve.storage import ObjectStore
from serve.uploads import SpooledPictureLost, Uploads

_log = logging.getLogger("ray.serve")
_PROMPTS_LEFT_OUT = "The prompts are too long for a JPEG's metadata: the picture carries none."


class Production:
    """Makes the pictures of jobs; keeps nothing of them but a sum.

    Attributes:
        joules: Of denoising all pictures stored so far, where cards told; None as long as none did.
    """

    def __init__(
        self,
        stages: Stages,
        store: ObjectStore,
        metrics: telemetry.Metrics,
        identity: PipelineIdentity,
        loras: LoraLibrary,
        uploads: Uploads,
        share: FairShare,
    ) -> None:
        self._share = share
        self._stages = stages
        self._loras = loras
        self._store = store
        self._metrics = metrics
        self._identity = identity
        self._uploads = uploads
        self._inputs = Inputs(store)
        self.joules: float | None = None

    async def make(self, job: RunningJob) -> GenerateResult:
        """Make and store every picture of a job, publishing events on the way.

        Raises:
            DeadlineExceeded: The job's deadline passed, in whichever stage.
            KelvinError: The first failure; the other pictures are given up.
        """
        return await job.in_time(self._make(job))

    async def _make(self, job: RunningJob) -> GenerateResult:
        request = job.request
        loras = LoraUses()
        if request.loras:
            loras = await asyncio.to_thread(self._loras.uses, request)
        positive, negative = await self._encode(request, loras)
        init = await self._start_image(request)
        given = Given(positive, negative, init, loras)
        encoded = (positive, negative, init)
        job.gpu_s += sum(each.stamp.seconds for each in encoded if each is not None)
        job.publish(JobEvent(event="text", id=job.id))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._picture(job, index, given))
                    for index in range(request.num_images)
                ]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        pictures = [task.result() for task in tasks]
        warnings = [*positive.warnings, *(negative.warnings if negative else ())]
        if not prompts_fit(request):
            warnings.append(_PROMPTS_LEFT_OUT)
        return GenerateResult(
            id=job.id,
            model=request.model or "",
            request=request,
            images=tuple(picture.ref for picture in pictures),
            stages=(
                text_report(positive, negative),
                *(() if init is None else (report("encode", init.stamp, None),)),
                *(report for picture in pictures for report in picture.reports),
            ),
            seconds=time.monotonic() - job.accepted_at,
            joules=sum_of([picture.joules for picture in pictures]),
            warnings=tuple(dict.fromkeys(warnings)),
        )

    async def _encode(
        self, request: GenerateRequest, loras: LoraUses
    ) -> tuple[PromptEmbedding, PromptEmbedding | None]:
        with telemetry.span("kelvin.text", kind=SpanKind.CLIENT):
            embeddings = await self._stages.encode(text_jobs(request, loras))
        return embeddings[0], embeddings[1] if len(embeddings) > 1 else None

    async def _start_image(self, request: GenerateRequest) -> EncodedImage | None:
        if request.init_image is None:
            return None
        with telemetry.span("kelvin.encode", kind=SpanKind.CLIENT):
            pixels = await self._inputs.pixels(request.init_image)
            return await self._stages.encode_image(pixels)

    async def _picture(self, job: RunningJob, index: int, given: Given) -> MadePicture:
        """Make a picture and store it, or store what was made of it before its Pipeline died."""
        while True:
            started = time.monotonic()
            with telemetry.span("kelvin.spool", {"kelvin.image": index}):
                picture = await self._uploads.resumed(job.id, index)
            if picture is None:
                await self._uploads.room(job.request)
                picture, data = await self._made(job, index, given)
                started = time.monotonic()
                size = {"kelvin.image": index, "kelvin.size_bytes": len(data)}
                try:
                    with telemetry.span("kelvin.store", size, kind=SpanKind.CLIENT):
                        await self._uploads.upload(job.id, picture, data)
                except SpooledPictureLost as lost:
                    _log.warning("A picture is made again: %s", lost)
                    continue
            return await self._stored(picture, time.monotonic() - started)

    async def _stored(self, picture: MadePicture, seconds: float) -> MadePicture:
        stamp = Stamp(self._identity.replica, self._identity.pid, "none", 0.0, seconds)
        self._metrics.stage_seconds("store", seconds)
        self._metrics.images()
        if picture.joules is not None:
            self._metrics.joules(picture.joules)
            self.joules = (self.joules or 0.0) + picture.joules
        key = self._store.key_of(picture.ref.s3_uri)
        with telemetry.span("kelvin.presign", {"kelvin.image": picture.ref.index}):
            url = "" if key is None else await asyncio.to_thread(self._store.presign, key)
        return MadePicture(
            ref=picture.ref.model_copy(update={"url": url}),
            reports=(*picture.reports, report("store", stamp, picture.ref.index)),
            joules=picture.joules,
        )

    async def _made(self, job: RunningJob, index: int, given: Given) -> tuple[MadePicture, bytes]:
        request = job.request
        seed = ((request.seed or 0) + index) % (LARGEST_SEED + 1)
        paths: set[ForwardPath] = set()

        def on_progress(progress: StepProgress) -> None:
            paths.add(progress.path)
            begun()
            spent.append(progress.seconds)
            job.publish(
                JobEvent(
                    event="step",
                    id=job.id,
                    image=index,
                    step=progress.step,
                    steps=progress.steps,
                    path=progress.path,
                    preview=None if progress.preview is None else preview_text(progress.preview),
                )
            )

        asked = denoise_job(job, index, seed, given)
        spent: list[float] = []
        cost_s = self._stages.estimated_s(asked)
        try:
            async with self._turn(job, cost_s, index) as begun:
                # Its deadline counts from here, and it may have waited.
                asked = replace(asked, deadline_s=job.seconds_left)
                about = {"kelvin.image": index}
                with telemetry.span("kelvin.denoise", about, kind=SpanKind.CLIENT) as span:
                    latents = await self._stages.denoise(asked, on_progress)
                    if latents.joules is not None:
                        span.set_attribute("kelvin.joules", latents.joules)
                    span.set_attribute("kelvin.moves", latents.moves)
            if latents.cool_s is not None:
                spent = [latents.cool_s]
        finally:
            job.gpu_s += sum(spent)
        self._metrics.moved(latents.moves, latents.steps_repeated)
        with telemetry.span("kelvin.decode", {"kelvin.image": index}, kind=SpanKind.CLIENT):
            pixels = await self._stages.decode(latents)
        job.gpu_s += pixels.stamp.seconds
        job.publish(JobEvent(event="decode", id=job.id, image=index))
        with telemetry.span("kelvin.picture", {"kelvin.image": index}):
            ref, data = await self._encoded(job, index, seed, pixels.pixels)
        reports = (
            denoise_report(latents, paths, index),
            report("decode", pixels.stamp, index),
        )
        return MadePicture(ref=ref, reports=reports, joules=latents.joules), data

    @asynccontextmanager
    async def _turn(
        self, job: RunningJob, cost_s: float, index: int
    ) -> AsyncIterator[Callable[[], None]]:
        """Be a picture's turn among those of all tenants, as `FairShare.turn`."""
        async with AsyncExitStack() as held:
            came = time.monotonic()
            turn = self._share.turn(job.tenant, cost_s, job.request.priority)
            with telemetry.span("kelvin.share", {"kelvin.image": index}):
                begun = await held.enter_async_context(turn)
            self._metrics.queue_seconds("share", time.monotonic() - came)
            yield begun

    async def _encoded(
        self, job: RunningJob, index: int, seed: int, pixels: NDArray[np.uint8]
    ) -> tuple[ImageRef, bytes]:
        request = job.request
        data, sha256 = await asyncio.to_thread(_file, pixels, request, seed)
        ext = EXTENSIONS[request.output_format]
        key = JobJournal.image_key(job.id, index, sha256, ext, job.tenant)
        height, width, _ = pixels.shape
        ref = ImageRef(
            index=index,
            s3_uri=self._store.s3_uri(key),
            url="",
            sha256=sha256,
            size_bytes=len(data),
            width=width,
            height=height,
            output_format=request.output_format,
            seed=seed,
        )
        return ref, data


def _file(pixels: NDArray[np.uint8], request: GenerateRequest, seed: int) -> tuple[bytes, str]:
    data = encode_picture(pixels, request, seed)
    return data, hashlib.sha256(data).hexdigest()
