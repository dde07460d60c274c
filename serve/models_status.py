"""What `/v1/models` and `/v1/status` say of the models of a service."""

from __future__ import annotations

import asyncio
from typing import Any

from serve.autoscaling_status import shown_autoscaling
from serve.loras import shown_loras
from serve.model_applications import ModelState, application_of
from serve.served_models import ServedModel, ServedModels


async def shown_models(models: ServedModels) -> list[dict[str, Any]]:
    """Return every model, the service's own first; what only loads has a name and a state."""
    shown = [await _shown(models.own, "loaded", is_own=True, shares=[])]
    for name, (state, model) in sorted((await models.further()).items()):
        if model is None:
            shown.append({"name": name, **_words(state), "is_own": False})
        else:
            shares: list[str] = sorted(model.facts.shared)
            shown.append(await _shown(model, state.state, is_own=False, shares=shares))
    return shown


async def shown_further(models: ServedModels, application: str) -> dict[str, dict[str, Any]]:
    """Return each further model's state, replicas and autoscaling, without pools it shares.

    Args:
        models: Of the service.
        application: Name of the service's.
    """
    further = (await models.further()).items()
    shown = await asyncio.gather(
        *(_further(application, name, state, model) for name, (state, model) in further)
    )
    return dict(zip((name for name, _ in further), shown, strict=True))


async def _further(
    application: str, name: str, state: ModelState, model: ServedModel | None
) -> dict[str, Any]:
    if model is None:
        return _words(state)
    facts = model.facts
    stages = await model.readiness.replicas()
    autoscaling = await asyncio.to_thread(
        shown_autoscaling, application_of(application, name), facts.settings
    )
    own = {pool.name for pools in facts.own_pools.values() for pool in pools}
    autoscaling["pools"] = {
        pool: told for pool, told in autoscaling["pools"].items() if pool in own
    }
    return {
        **_words(state),
        "shares": sorted(facts.shared),
        "stages": {stage: told for stage, told in stages.items() if stage not in facts.shared},
        "autoscaling": autoscaling,
    }


async def _shown(
    model: ServedModel, state: str, *, is_own: bool, shares: list[str]
) -> dict[str, Any]:
    spec = model.facts.spec
    loras = await asyncio.to_thread(shown_loras, model.loras)
    return {
        "name": spec.name,
        "state": state,
        "is_own": is_own,
        "shares": shares,
        "loras": loras["available"],
        **spec.model_dump(exclude={"name"}),
    }


def _words(state: ModelState) -> dict[str, Any]:
    return {"state": state.state} | ({"message": state.message} if state.message else {})
