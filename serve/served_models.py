"""The models that a Pipeline can reach: the service's own, and those that come and go beside it.

The own model is bound to the Pipeline and found without asking anybody. A further one is an
application of its own (`serve.model_applications`): the Pipeline asks Serve which there are when a
request names one, remembers the answer for seconds, and holds handles to the pools of those that it
has met. So loading and unloading restart nothing here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve import telemetry
from serve.errors import ModelLoading, StageUnavailable
from serve.fair_share import FairShare
from serve.further_models import ModelFacts
from serve.loras import LoraLibrary
from serve.model_applications import ModelState, application_of, model_states
from serve.model_watch import ModelWatch
from serve.models import model_not_found
from serve.outlook import Outlook
from serve.pipeline_identity import PipelineIdentity
from serve.pool_choice import PoolChoice
from serve.production import Production
from serve.readiness import Readiness
from serve.requests import GenerateResult
from serve.running import RunningJob
from serve.shared_questions import SharedQuestions
from serve.stages import Stages
from serve.storage import ObjectStore
from serve.uploads import Uploads

_log = logging.getLogger("ray.serve")

# Serve's account of itself costs it tens of milliseconds. Who has met a model asks seldom: only a
# model taken away behind our commands' backs is learnt of that late.
_ASKED_AGAIN_S = 10.0
_ASKED_AGAIN_FOR_UNKNOWN_S = 1.0
_WATCHED_EVERY_S = 3.0
_CARD_ANSWERS_WITHIN_S = 10.0
_BETWEEN_TRIES_S = 1.0


@dataclass(frozen=True)
class ServedModel:
    """A model with what makes its pictures."""

    facts: ModelFacts
    stages: Stages
    production: Production
    readiness: Readiness
    loras: LoraLibrary
    outlook: Outlook
    deployed_at: float | None = None  # of its application; None: it is the service's own


class ServedModels:
    """Finds the model of a request. All on one event loop.

    Args:
        own: The service's own model.
        handles: Of its pools, by name.
        store: Of pictures.
        metrics: Of this process.
        identity: Of this process; without an application there are no further models.
        uploads: Of finished pictures.
    """

    def __init__(
        self,
        own: ModelFacts,
        handles: Mapping[str, DeploymentHandle],
        store: ObjectStore,
        metrics: telemetry.Metrics,
        identity: PipelineIdentity,
        uploads: Uploads,
    ) -> None:
        self._store = store
        self._uploads = uploads
        self._metrics = metrics
        self._identity = identity
        self._joules: float | None = None  # of models that have gone
        self.own = self._served(own, handles)
        self._further: dict[str, ServedModel] = {}
        self._closed: dict[str, float] = {}  # until when, unless closed again
        self._watch = ModelWatch(partial(model_states, identity.application))
        self._guard = asyncio.Lock()
        self._adopting = SharedQuestions[ServedModel](_CARD_ANSWERS_WITHIN_S)

    async def find(self, name: str | None) -> ServedModel:
        """Return the model that takes a new request.

        Args:
            name: Of the model; None is the service's own.

        Raises:
            ModelNotFound: It is not served, or on its way out; names those that are.
            ModelLoading: It is being loaded.
            StageUnavailable: It does not say what it is.
        """
        if name is None or name == self.own.facts.spec.name:
            return self.own
        if self._closed.get(name, 0.0) > time.monotonic():
            raise model_not_found(name, self._names())
        return await self._find(name)

    async def make(self, job: RunningJob) -> GenerateResult:
        """Make an accepted job's pictures, with its model even if that takes no new requests.

        Raises:
            KelvinError: As `Production.make`, or the model has gone.
        """
        model = await job.in_time(self._when_loaded(job.request.model))
        making = model.production.make(job)
        made = await (making if model is self.own else self._while_there(model, making))
        said = model.facts.spec.warnings(made.request)
        return made.model_copy(update={"warnings": (*made.warnings, *said)}) if said else made

    def met(self, name: str | None) -> ServedModel | None:
        """Return a model if this process holds it already; asks nobody."""
        if name is None or name == self.own.facts.spec.name:
            return self.own
        return self._further.get(name)

    def close(self, name: str, for_s: float) -> None:
        """Take no new requests for a further model for so long; accepted jobs go on."""
        self._closed[name] = time.monotonic() + for_s

    def reopen(self, name: str) -> None:
        """Undo `close`, and ask Serve anew."""
        self._closed.pop(name, None)
        self._watch.forget()

    async def further(self) -> dict[str, tuple[ModelState, ServedModel | None]]:
        """Return each further model's state, and what serves it where it is loaded."""
        found: dict[str, tuple[ModelState, ServedModel | None]] = {}
        for name, state in (await self._known(_ASKED_AGAIN_FOR_UNKNOWN_S)).items():
            model = None
            if state.state == "loaded":
                try:
                    model = await self._met_or_adopted(name, state)
                except StageUnavailable as error:
                    state = ModelState("failed", state.deployed_at, error.message)
            if self._closed.get(name, 0.0) > time.monotonic():
                state = ModelState("unloading", state.deployed_at)
            found[name] = state, model
        return found

    @property
    def joules(self) -> float | None:
        """Of denoising all pictures stored so far, where cards told; None as long as none did."""
        known = [self._joules, *(model.production.joules for model in self._all())]
        told = [each for each in known if each is not None]
        return sum(told) if told else None

    def _all(self) -> Iterator[ServedModel]:
        yield self.own
        yield from self._further.values()

    def _names(self) -> list[str]:
        now = time.monotonic()
        loaded = (name for name, state in self._watch.states.items() if state.state == "loaded")
        return [
            self.own.facts.spec.name,
            *sorted(name for name in loaded if self._closed.get(name, 0.0) <= now),
        ]

    async def _when_loaded(self, name: str | None) -> ServedModel:
        while True:
            try:
                return self.met(name) or await self._find(str(name))
            except ModelLoading:  # of a job that was accepted before a restart
                await asyncio.sleep(_BETWEEN_TRIES_S)

    async def _while_there(
        self, model: ServedModel, making: Coroutine[Any, Any, GenerateResult]
    ) -> GenerateResult:
        """Give up once the model has gone: what is sent to pools that are no more waits for ever.

        Raises:
            StageUnavailable: It has.
        """
        work = asyncio.get_running_loop().create_task(making)
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=_WATCHED_EVERY_S)
                if not work.done() and not await self._is_there(model):
                    name = model.facts.spec.name
                    raise StageUnavailable(
                        f"Model {name!r} was taken away while it worked on this.",
                        field="model",
                        value=name,
                        allowed=f"one of: {', '.join(self._names())}",
                    )
        finally:
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
        return work.result()

    async def _is_there(self, model: ServedModel) -> bool:
        name = model.facts.spec.name
        if name not in await self._known(_WATCHED_EVERY_S):
            return False
        newer = self._further.get(name, model)
        return newer.facts.pool_names == model.facts.pool_names

    async def _find(self, name: str) -> ServedModel:
        is_met = name in self._further
        states = await self._known(_ASKED_AGAIN_S if is_met else _ASKED_AGAIN_FOR_UNKNOWN_S)
        state = states.get(name)
        if state is None or state.state in ("unloading", "failed"):
            raise model_not_found(name, self._names())
        if name not in self._further and state.state == "loading":
            raise ModelLoading(
                f"Model {name!r} is being loaded.",
                field="model",
                value=name,
                allowed=f"try again later, or one of: {', '.join(self._names())}",
            )
        return await self._met_or_adopted(name, state)

    async def _known(self, max_age_s: float) -> Mapping[str, ModelState]:
        """Return the states of further models, asked of Serve if the last answer is too old."""
        if not self._identity.application:
            return {}
        async with self._guard:
            states = await self._watch.newest(max_age_s)
            for name in [name for name in self._further if not self._is_current(name)]:
                self._drop(name)
        return states

    def _is_current(self, name: str) -> bool:
        state = self._watch.states.get(name)
        if state is None or state.state in ("unloading", "failed"):
            return False
        # Deployed anew, with other pools perhaps: the old ones serve until the new ones do.
        return state.state == "loading" or state.deployed_at == self._further[name].deployed_at

    def _drop(self, name: str) -> None:
        joules = self._further.pop(name).production.joules
        if joules is not None:
            self._joules = (self._joules or 0.0) + joules

    async def _met_or_adopted(self, name: str, state: ModelState) -> ServedModel:
        if name in self._further:
            return self._further[name]
        try:
            adopted = await self._adopting.answer(
                (name, state.deployed_at), partial(self._adopted, name, state)
            )
        except Exception as error:
            # Ray's and Serve's own, of many classes: its application may just have gone.
            _log.exception("model %s does not say what it is", name)
            raise StageUnavailable(
                f"Model {name!r} cannot be reached: {type(error).__name__}.",
                field="model",
                value=name,
                allowed="try again later",
            ) from None
        return self._further.setdefault(name, adopted)

    async def _adopted(self, name: str, state: ModelState) -> ServedModel:
        application = application_of(self._identity.application, name)
        card = await asyncio.to_thread(serve.get_app_handle, application)
        facts: ModelFacts = await asyncio.wait_for(
            card.describe.remote(), timeout=_CARD_ANSWERS_WITHIN_S
        )
        handles: dict[str, DeploymentHandle] = {}
        for stage, pools in facts.settings.pools.items():
            for pool in pools:
                if stage in facts.shared:
                    handles[pool.name] = self.own.stages.pools[stage][pool.name]
                else:
                    handles[pool.name] = await asyncio.to_thread(
                        serve.get_deployment_handle, pool.name, application
                    )
        return self._served(facts, handles, state.deployed_at)

    def _served(
        self,
        facts: ModelFacts,
        handles: Mapping[str, DeploymentHandle],
        deployed_at: float | None = None,
    ) -> ServedModel:
        settings = facts.settings
        stages = Stages(
            {
                stage: {pool.name: handles[pool.name] for pool in pools}
                for stage, pools in settings.pools.items()
            },
            PoolChoice(settings),
            retries=settings.pipeline.stage_retries,
        )
        may_be_empty = frozenset(
            pool.name
            for pools in settings.pools.values()
            for pool in pools
            if pool.min_replicas == 0
        )
        loras = LoraLibrary(settings.model, settings.lora, settings.storage, weights=False)
        return ServedModel(
            facts,
            stages,
            Production(
                stages,
                self._store,
                self._metrics,
                self._identity,
                loras,
                self._uploads,
                FairShare(settings.tenants),
            ),
            Readiness(stages, self._store, may_be_empty),
            loras,
            Outlook(settings),
            deployed_at,
        )
