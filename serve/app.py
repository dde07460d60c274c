"""The builder: settings -> Ray Serve application. The only place that makes deployments.

`serve run serve.app:build` and a YAML file's `args` pass the tree of `Settings` as they are.
"""

# No `from __future__ import annotations` here: Serve converts the argument of a builder only if
# its annotation is a class, and hands over a bare dict otherwise.
from typing import Any

from ray import serve
from ray.serve import Application

from deployments.denoiser import Denoiser
from deployments.text_encoder import TextEncoder
from deployments.vae_decoder import VaeDecoder
from serve.config import ModelSettings, PipelineSettings, PoolSettings, Settings
from serve.errors import Overloaded
from serve.model_dir import model_name, resolve_model_dir
from serve.models import ModelSpec
from serve.pipeline import Pipeline

APP_NAME = "kelvin"
PIPELINE_NAME = "pipeline"

# Above the longest denoise plus upload: a call under way when a replica is asked to go, ends. A job
# of POST /v1/jobs is no call: one that outlives its Pipeline stays pending in the store.
_GRACEFUL_SHUTDOWN_S = 120.0
# Beside generate calls, which the Pipeline counts itself, it must still answer status and health.
_ROOM_FOR_OTHER_CALLS = 64
_RETRY_AFTER_S = 2


def build(settings: Settings) -> Application:
    """Return the application: the Pipeline as ingress, and one deployment per pool.

    Raises:
        ConfigurationError: The model folder cannot be used.
    """
    spec = ModelSpec.from_directory(resolve_model_dir(settings.model), model_name(settings.model))
    (text_encoder,) = settings.text_encoder
    (denoiser,) = settings.denoiser
    (vae_decoder,) = settings.vae_decoder
    pipeline = serve.deployment(
        serve.ingress()(Pipeline),
        name=PIPELINE_NAME,
        **_pipeline_options(settings.pipeline),
    )
    return pipeline.bind(
        settings,
        spec,
        _pool(TextEncoder, settings.model, text_encoder),
        _pool(Denoiser, settings.model, denoiser),
        _pool(VaeDecoder, settings.model, vae_decoder),
    )


def _pool(stage: type, model: ModelSettings, pool: PoolSettings) -> Application:
    actor: dict[str, Any] = {"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus}
    if pool.accelerator_type is not None:
        actor["accelerator_type"] = pool.accelerator_type
    return serve.deployment(
        stage,
        name=pool.name,
        num_replicas=pool.num_replicas,
        max_ongoing_requests=pool.max_ongoing_requests,
        max_queued_requests=pool.max_queued_requests,
        graceful_shutdown_timeout_s=_GRACEFUL_SHUTDOWN_S,
        ray_actor_options=actor,
    ).bind(model, pool)


def _pipeline_options(settings: PipelineSettings) -> dict[str, Any]:
    room = settings.max_ongoing_requests + _ROOM_FOR_OTHER_CALLS
    return {
        "num_replicas": settings.num_replicas,
        "max_ongoing_requests": room,
        # In each proxy and each caller by handle, while all replicas are full. Who comes on top is
        # refused before any Pipeline sees the call, so Serve answers by itself: over HTTP a plain
        # text without Kelvin's error body, by handle ray.serve's BackPressureError.
        "max_queued_requests": room,
        "backpressure_config": {
            "status_code": Overloaded.status,
            "retry_after_s": _RETRY_AFTER_S,
        },
        "graceful_shutdown_timeout_s": _GRACEFUL_SHUTDOWN_S,
        "ray_actor_options": {"num_cpus": settings.num_cpus},
    }
