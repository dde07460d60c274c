"""What the requests of a load test ask for: prompts that repeat, sizes and step counts that vary.

Prompts repeat by Zipf's law, the k-th most popular in proportion to 1/k, as queries to public
services roughly do (Breslau et al. 1999, "Web caching and Zipf-like distributions"): caches of
prompts help as much as they would there, and no more. Seeds never repeat, so no picture is asked
for twice. Everything is stated in each request, so that all doors ask for the same work.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

VARIED, PLAIN = "varied", "plain"
MIXES = (VARIED, PLAIN)

# width : height -> how often; each has about the pixels of the model's own size.
_ASPECTS = {(1.0, 1.0): 0.7, (0.875, 1.125): 0.15, (1.125, 0.875): 0.15}
# Share of the model's default steps -> how often: drafts, the default, and patient people.
_STEPS = {0.4: 0.15, 0.7: 0.15, 1.0: 0.5, 1.4: 0.15, 1.8: 0.05}
_MOST_STEPS = 200
_SEEDS = 2**53  # exact in every JSON reader


@dataclass(frozen=True)
class ModelFacts:
    """What `/v1/models` says of the model that is to draw; sides in pixels."""

    name: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    scheduler: str
    size_multiple: int
    smallest_side: int
    largest_side: int

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> ModelFacts:
        """Return the facts in one element of `/v1/models`; KeyError: something is not said."""
        defaults = told["defaults"]
        names = ("width", "height", "num_inference_steps", "guidance_scale", "sampler", "scheduler")
        return cls(
            name=told["name"],
            **{name: defaults[name] for name in names},
            size_multiple=told["size_multiple"],
            smallest_side=told["smallest_side"],
            largest_side=min(told["largest_width"], told["largest_height"]),
        )


class RequestMix:
    """Draws requests, each by its number: the same number is the same request in every run.

    Args:
        model: That is to draw.
        prompts: To choose from; which are popular is drawn by the seed.
        mix: `varied`, or `plain`: the model's own size and steps for all.
        seed: Of all draws.
    """

    def __init__(self, model: ModelFacts, prompts: Sequence[str], mix: str, seed: int) -> None:
        self._model = model
        self._seed = seed
        self._varied = mix == VARIED
        self._prompts = random.Random(f"popular {seed}").sample(prompts, len(prompts))
        self._popularity = list(accumulate(1 / rank for rank in range(1, len(prompts) + 1)))

    def request(self, number: int) -> dict[str, Any]:
        """Return the fields of a `GenerateRequest`."""
        draw = random.Random(f"request {self._seed} {number}")
        model = self._model
        (prompt,) = draw.choices(self._prompts, cum_weights=self._popularity)
        width, height, steps = model.width, model.height, model.num_inference_steps
        if self._varied:
            ((across, up),) = draw.choices(list(_ASPECTS), list(_ASPECTS.values()))
            (share,) = draw.choices(list(_STEPS), list(_STEPS.values()))
            width, height = self._side(across * width), self._side(up * height)
            steps = min(max(1, round(share * steps)), _MOST_STEPS)
        return {
            "prompt": prompt,
            "width": width,
            "height": height,
            "num_inference_steps": steps,
            "guidance_scale": model.guidance_scale,
            "seed": draw.randrange(_SEEDS),
            "model": model.name,
        }

    def _side(self, pixels: float) -> int:
        model = self._model
        side = round(pixels / model.size_multiple) * model.size_multiple
        return max(model.smallest_side, min(side, model.largest_side))
