"""The builders: settings -> Ray Serve applications. The only place that makes deployments.

`serve run serve.app:build` and a YAML file's `args` pass the tree of `Settings` as they are. Each
further model of a service is an application of its own, by `serve.app:build_model`.
"""

# No `from __future__ import annotations` here: Serve converts the argument of a builder only if
# its annotation is a class, and hands over a bare dict otherwise.
from dataclasses import asdict
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from cluster.card_kinds import card_kind
from cluster.pool_state import Stage
from cluster.serve_states import PoolFacts
from deployments.denoiser import Denoiser
from deployments.text_encoder import TextEncoder
from deployments.vae_decoder import VaeDecoder
from serve.card_fit import refuse_what_cannot_fit
from serve.config import ModelEntry, PoolSettings, Settings
from serve.errors import ConfigurationError, Overloaded
from serve.further_models import ModelFacts, further_model
from serve.graceful_shutdown import graceful_shutdown_s, pipeline_graceful_shutdown_s
from serve.heat_settings import AutoscalingSettings, Section
from serve.model_card import ModelCard
from serve.model_dir import model_name, resolve_model_dir
from serve.models import Defaults, ModelSpec
from serve.pipeline import Pipeline
from serve.pool_choice import estimated_speed, kind_of_card

APP_NAME = "kelvin"
PIPELINE_NAME = "pipeline"
_CARD_NAME = "model"

# Beside generate calls, which the Pipeline counts itself, it must still answer status and health.
_ROOM_FOR_OTHER_CALLS = 64
_RETRY_AFTER_S = 2
_REPORTED_EVERY_S = 1.0

_CLASSES: dict[Stage, type] = {"text": TextEncoder, "denoise": Denoiser, "decode": VaeDecoder}


class _ServedPipeline(Pipeline):
    """A Pipeline in Serve, which awaits this once a replica's calls are done, before it ends.

    A class of its own: the interpreter calls it as well, and would not await it.
    """

    async def __del__(self) -> None:
        await self.depart()


class ModelApplication(Section):
    """What `build_model` makes an application of.

    Its name must be the service's, a dot and the model's: `kelvin.stable-diffusion-3.5-medium`.
    """

    service: Settings
    entry: ModelEntry


def build_model(application: ModelApplication) -> Application:
    """Return the application of a further model, which the service's Pipelines find by its name.

    Raises:
        ConfigurationError: The model folder cannot be used.
    """
    return model_application(further_model(application.service, application.entry))


def model_application(facts: ModelFacts) -> Application:
    """Return the application of a further model: a card as ingress, and its own pools."""
    refuse_what_cannot_fit([(facts.settings.model, facts.own_pools)])
    pools = [
        _pool(facts.settings, facts.spec, stage, pool)
        for stage, pools in facts.own_pools.items()
        for pool in pools
    ]
    card = serve.deployment(ModelCard, name=_CARD_NAME, ray_actor_options={"num_cpus": 0})
    return card.bind(facts, tuple(pools))


def build(settings: Settings) -> Application:
    """Return the application: the Pipeline as ingress, and one deployment per pool.

    Raises:
        ConfigurationError: The model folder cannot be used, or there are further models, each of
            which is an application of its own.
    """
    if settings.models:
        raise ConfigurationError(
            "One application has one model; section models is for `kelvin up`.",
            field="models",
            value=len(settings.models),
            allowed="an application by serve.app:build_model for each of them, or"
            " `kelvin models load`",
        )
    folder = resolve_model_dir(settings.model, weights=False)
    spec = ModelSpec.from_directory(folder, model_name(settings.model))
    refuse_what_cannot_fit([(settings.model, settings.pools)])
    pipeline = serve.deployment(
        serve.ingress()(_ServedPipeline),
        name=PIPELINE_NAME,
        **_logging(settings),
        **_pipeline_options(settings, spec.defaults),
    )
    pools = {
        pool.name: _pool(settings, spec, stage, pool)
        for stage, stage_pools in settings.pools.items()
        for pool in stage_pools
    }
    return pipeline.bind(settings, spec, pools)


def _pool(settings: Settings, spec: ModelSpec, stage: Stage, pool: PoolSettings) -> Application:
    actor: dict[str, Any] = {"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus}
    if pool.accelerator_type is not None:
        actor["accelerator_type"] = pool.accelerator_type
    if pool.label_selector:
        actor["label_selector"] = pool.label_selector
    deployment = serve.deployment(
        _CLASSES[stage],
        name=pool.name,
        max_ongoing_requests=pool.max_ongoing_requests,
        max_queued_requests=pool.max_queued_requests,
        max_surge_percent=pool.max_surge_percent,
        graceful_shutdown_timeout_s=graceful_shutdown_s(stage, pool, spec.defaults),
        ray_actor_options=actor,
        max_replicas_per_node=pool.max_replicas_per_node,
        **_logging(settings),
        **replicas_of(settings.autoscaling, spec.name, stage, pool),
        **_routing(settings, pool),
    )
    if stage == "denoise":
        return deployment.bind(
            settings.model,
            pool,
            settings.thermal,
            settings.governor,
            settings.lora,
            settings.storage,
        )
    if stage == "text":
        return deployment.bind(settings.model, pool, settings.lora, settings.storage)
    return deployment.bind(settings.model, pool)


def replicas_of(
    settings: AutoscalingSettings, model: str, stage: Stage, pool: PoolSettings
) -> dict[str, Any]:
    """Return the options of a deployment that say how many replicas it has.

    Args:
        settings: Section `autoscaling`.
        model: Name of the model that the pool serves.
        stage: Of the pool.
        pool: The pool.
    """
    if not pool.is_autoscaled:
        return {"num_replicas": pool.num_replicas}
    bounds = {
        "min_replicas": pool.min_replicas,
        "max_replicas": pool.max_replicas,
        "initial_replicas": pool.num_replicas,
    }
    if settings.policy == "queue":
        return {"autoscaling_config": AutoscalingConfig(**bounds)}
    kind = kind_of_card(pool)
    facts = PoolFacts(
        name=pool.name,
        stage=stage,
        model=model,
        kind=kind,
        kind_speed=estimated_speed(pool),
        is_estimate=pool.kind_speed is None,
        cost_per_hour=pool.cost_per_hour or card_kind(kind).cost_per_hour,
        start_s=pool.start_s,
    )
    policy = AutoscalingPolicy(
        policy_function="cluster.serve_autoscaling:PoolPolicy",
        policy_kwargs={"pool": asdict(facts), "settings": settings.model_dump(exclude={"policy"})},
    )
    # The plan alone decides when: Serve's own delays would come on top of its.
    delays = {"upscale_delay_s": 0.0, "downscale_delay_s": 0.0, "downscale_to_zero_delay_s": 0.0}
    # Serve's default is 10 s between two reports: a card throttles in less.
    config = AutoscalingConfig(
        **bounds,
        **delays,
        metrics_interval_s=_REPORTED_EVERY_S,
        look_back_period_s=2 * _REPORTED_EVERY_S,
        policy=policy,
    )
    return {"autoscaling_config": config}


def _logging(settings: Settings) -> dict[str, Any]:
    # Not left to the environment: in a cluster that is somebody else's.
    if settings.telemetry.log_format == "text":
        return {}
    return {"logging_config": {"encoding": "JSON"}}


def _routing(settings: Settings, pool: PoolSettings) -> dict[str, Any]:
    if settings.routing.policy == "power_of_two":
        return {}
    router = RequestRouterConfig(
        request_router_class="cluster.serve_routing:KelvinRouter",
        request_router_kwargs={
            "pipelines": settings.pipeline.num_replicas,
            "max_queued": pool.max_queued_requests,
        },
    )
    return {"request_router_config": router}


def _pipeline_options(settings: Settings, defaults: Defaults) -> dict[str, Any]:
    pipeline = settings.pipeline
    room = pipeline.max_ongoing_requests + _ROOM_FOR_OTHER_CALLS
    actor: dict[str, Any] = {"num_cpus": pipeline.num_cpus}
    if pipeline.label_selector:
        actor["label_selector"] = pipeline.label_selector
    return {
        "num_replicas": pipeline.num_replicas,
        "max_ongoing_requests": room,
        # In each proxy and each caller by handle, while all replicas are full. Who comes on top is
        # refused before any Pipeline sees the call, so Serve answers by itself: over HTTP a plain
        # text without Kelvin's error body, by handle ray.serve's BackPressureError.
        "max_queued_requests": room,
        "max_surge_percent": pipeline.max_surge_percent,
        "backpressure_config": {
            "status_code": Overloaded.status,
            "retry_after_s": _RETRY_AFTER_S,
        },
        "graceful_shutdown_timeout_s": pipeline_graceful_shutdown_s(settings.denoiser, defaults),
        "max_replicas_per_node": pipeline.max_replicas_per_node,
        "ray_actor_options": actor,
    }
