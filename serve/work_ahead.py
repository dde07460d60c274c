"""What a Pipeline has taken on and stages have not done yet, counted by kind of work.

Only counts are kept: what each kind takes is learnt all the time, and looked up when somebody asks.
On one event loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from cluster.pool_state import Stage
from cluster.work_sizes import Asked, asked_picture, asked_prompts, asked_steps
from deployments.sd3.sigmas import steps_taken
from serve.requests import GenerateRequest, JobEvent

Pools = tuple[str, ...]
"""The names of a stage's pools: models may share them."""


def kinds_of(request: GenerateRequest) -> dict[Stage, tuple[Asked, int]]:
    """Return, for each stage, the kind of a resolved request's work and how much each piece is."""
    width, height = request.width or 0, request.height or 0
    rows = 2 if (request.guidance_scale or 0.0) > 1 else 1
    return {
        "text": (asked_prompts(rows), 1),
        "denoise": (
            asked_steps(width, height, rows),
            steps_taken(request.num_inference_steps or 0, request.strength or 1.0),
        ),
        "decode": (asked_picture(width, height), 1),
    }


class WorkAhead:
    """Counts of work, by pools, tenant and kind."""

    def __init__(self) -> None:
        self._counts: dict[Pools, dict[str, Counter[Asked]]] = {}

    def of(self, pools: Pools) -> Mapping[str, Mapping[Asked, int]]:
        """Return tenant -> kind -> how much of it is to be done by a stage."""
        return self._counts.get(pools, {})

    def take_on(
        self, request: GenerateRequest, tenant: str, pools: Mapping[Stage, Pools]
    ) -> WorkLeft:
        """Count a request's work; what is returned is to be told how it goes on.

        Args:
            request: Resolved.
            tenant: Whose.
            pools: Of its model.
        """
        return WorkLeft(self, request, tenant, pools)

    def add(self, pools: Pools, tenant: str, kind: Asked, number: int) -> None:
        """Count more work, or less."""
        tenants = self._counts.setdefault(pools, {})
        counts = tenants.setdefault(tenant, Counter())
        counts[kind] += number
        if counts[kind] <= 0:
            del counts[kind]
            if not counts:
                del tenants[tenant]


class WorkLeft:
    """What is left of one request."""

    def __init__(
        self,
        ahead: WorkAhead,
        request: GenerateRequest,
        tenant: str,
        pools: Mapping[Stage, Pools],
    ) -> None:
        self._ahead = ahead
        self._tenant = tenant
        self._kinds = {
            stage: (pools[stage], kind, size) for stage, (kind, size) in kinds_of(request).items()
        }
        self._left: dict[tuple[Stage, int], int] = {("text", 0): 1}
        for image in range(request.num_images):
            self._left["denoise", image] = self._kinds["denoise"][2]
            self._left["decode", image] = 1
        self._steps = self._kinds["denoise"][2] * request.num_images
        self.undone = 0.0
        """Share of its steps that were left when it was over."""
        for (stage, _), number in self._left.items():
            self._count(stage, number)

    def seen(self, event: JobEvent) -> None:
        """Take note of progress; steps that are done again count again."""
        if event.is_last:
            self.gone()
        elif event.event == "text":
            self._leave("text", 0, 0)
        elif event.event == "step":
            self._leave("denoise", event.image or 0, (event.steps or 0) - (event.step or 0))
        elif event.event == "decode":
            self._leave("denoise", event.image or 0, 0)
            self._leave("decode", event.image or 0, 0)

    def gone(self) -> None:
        """Nothing of it will be done here any more."""
        if self._left:
            steps = sum(number for (stage, _), number in self._left.items() if stage == "denoise")
            self.undone = steps / max(self._steps, 1)
        for stage, image in tuple(self._left):
            self._leave(stage, image, 0)
        self._left.clear()

    def _leave(self, stage: Stage, image: int, number: int) -> None:
        before = self._left.get((stage, image))
        if before is not None and before != number:
            self._left[stage, image] = number
            self._count(stage, number - before)

    def _count(self, stage: Stage, number: int) -> None:
        pools, kind, _ = self._kinds[stage]
        self._ahead.add(pools, self._tenant, kind, number)
