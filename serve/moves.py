"""A picture's way through denoisers that die or are asked to go: where the next one goes on."""

from __future__ import annotations

import logging
from dataclasses import replace

from deployments.payloads import Checkpoint, DenoiseJob, Handover, Latents, StepProgress
from serve.errors import KelvinError, StageUnavailable
from serve.move_errors import CheckpointRefused, ReplicaLeaving

_log = logging.getLogger("ray.serve")


class Journey:
    """What is known of one picture while it is denoised.

    Args:
        job: As it was first sent.
    """

    def __init__(self, job: DenoiseJob) -> None:
        self._job = job
        self._checkpoint = job.resume
        self._began = self._step = _step_of(self._checkpoint)
        self._is_moving = False
        self._moves = 0
        self._steps_repeated = 0

    def next_job(self) -> DenoiseJob:
        """Return what the next denoiser gets, but for the time that has passed."""
        self._began = self._step = _step_of(self._checkpoint)
        return replace(self._job, resume=self._checkpoint)

    def stepped(self, progress: StepProgress) -> StepProgress:
        """Take a step's news and return what is left of them for others."""
        self._step = progress.step
        # Until then it may have met more who go.
        self._moves += self._is_moving
        self._is_moving = False
        if progress.checkpoint is None:
            return progress
        self._checkpoint = progress.checkpoint
        return replace(progress, checkpoint=None)

    def handed_over(self, handover: Handover) -> ReplicaLeaving:
        """Take the work back from a replica that goes, and return what that means."""
        self._checkpoint = handover.checkpoint
        return ReplicaLeaving("The denoiser is asked to go and hands its work over.")

    def failed(self, error: KelvinError) -> KelvinError:
        """Take a denoiser's error.

        Returns:
            It, or what makes the picture be tried again.
        """
        if isinstance(error, CheckpointRefused):
            _log.warning("%s %s The picture starts again.", error.message, error.allowed)
            self._checkpoint = None
            self._steps_repeated += self._began
            return StageUnavailable(error.message)
        if isinstance(error, StageUnavailable) and self._step:
            self._is_moving = True
            self._steps_repeated += self._step - _step_of(self._checkpoint)
        return error

    def arrived(self, latents: Latents) -> Latents:
        """Return finished latents with what is to be told of the way."""
        if not self._moves:
            return latents
        steps = self._job.steps
        cool_s = latents.cool_s
        return replace(
            latents,
            # Of the last denoiser's part, they would pass for the whole.
            joules=None if self._began else latents.joules,
            # All steps once: who waits for a picture does not pay for its replica's end.
            cool_s=None if cool_s is None else cool_s * steps / (steps - self._began),
            moves=self._moves,
            steps_repeated=self._steps_repeated,
        )


def _step_of(checkpoint: Checkpoint | None) -> int:
    return 0 if checkpoint is None else checkpoint.step
