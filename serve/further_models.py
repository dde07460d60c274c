"""A further model of a service: what it is, which pools are its own and which it shares.

Large, Turbo and Medium have the same text encoders and VAE. Where the files say so, a further model
brings denoisers alone and uses the service's own text and decode pools, which stay as long as the
service does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.pool_state import Stage
from serve.checkpoints.fingerprint import fingerprint
from serve.config import ModelEntry, ModelSettings, PoolSettings, Settings
from serve.errors import ConfigurationError
from serve.loras import FOLDER
from serve.model_dir import lora_roots, model_name, resolve_model_dir
from serve.models import ModelSpec

SECTIONS: Mapping[Stage, str] = {
    "text": "text_encoder",
    "denoise": "denoiser",
    "decode": "vae_decoder",
}
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}"


@dataclass(frozen=True)
class ModelFacts:
    """One model of a service.

    Attributes:
        spec: What requests may ask of it.
        settings: The service's, with this model and the pools that serve it.
        shared: Stages whose pools are the service's own.
    """

    spec: ModelSpec
    settings: Settings
    shared: frozenset[Stage] = frozenset()

    @property
    def own_pools(self) -> dict[Stage, tuple[PoolSettings, ...]]:
        """Return stage -> pools that come and go with the model."""
        pools = self.settings.pools
        return {stage: pools[stage] for stage in pools if stage not in self.shared}

    @property
    def pool_names(self) -> list[str]:
        """Return the names of the pools that serve it, shared ones included."""
        return [pool.name for pools in self.settings.pools.values() for pool in pools]


def further_model(service: Settings, entry: ModelEntry) -> ModelFacts:
    """Look at a model's files and settle its pools; headers and samples are read, no weights.

    Args:
        service: Settings of the service.
        entry: What is said of the model.

    Raises:
        ConfigurationError: Files cannot be used, a name is taken or cannot be a name.
    """
    folder = resolve_model_dir(entry.model)
    spec = ModelSpec.from_directory(folder, model_name(entry.model))
    if not re.fullmatch(_NAME, spec.name):
        raise ConfigurationError(
            f"{spec.name!r} cannot be the name of a further model.",
            field="model.name",
            value=spec.name,
            allowed="letters, digits, dots, dashes and underscores, at most 80",
        )
    stated: dict[Stage, tuple[PoolSettings, ...]] = {
        "text": entry.text_encoder,
        "denoise": entry.denoiser,
        "decode": entry.vae_decoder,
    }
    may_be_shared: tuple[Stage, ...] = ("text", "decode")
    shared = {
        stage
        for stage in may_be_shared
        if not stated[stage]
        and fingerprint(folder, stage) == fingerprint(resolve_model_dir(service.model), stage)
        # A LoRA's part for text encoders is found by its name, in the folders of their own model.
        and (stage != "text" or _lora_folders(entry.model) == _lora_folders(service.model))
    }
    pools = {
        SECTIONS[stage]: service.pools[stage]
        if stage in shared
        else stated[stage] or (like_the_services(service, stage, spec.name),)
        for stage in SECTIONS
    }
    own = service.model_copy(update={**pools, "model": entry.model, "models": ()})
    facts = ModelFacts(spec, own, frozenset(shared))
    refuse_taken_pools(facts, (pool.name for each in service.pools.values() for pool in each))
    return facts


def further_models(service: Settings, own_name: str) -> tuple[ModelFacts, ...]:
    """Return all of section `models`.

    Args:
        service: Settings of the service.
        own_name: Of its own model.

    Raises:
        ConfigurationError: As `further_model` does, or two have one name.
    """
    found: list[ModelFacts] = []
    for entry in service.models:
        facts = further_model(service, entry)
        if facts.spec.name in (own_name, *(each.spec.name for each in found)):
            raise ConfigurationError(
                f"Two models have the name {facts.spec.name!r}.",
                field="models.model.name",
                value=facts.spec.name,
                allowed="a name of its own for each model",
            )
        taken = [pool.name for each in found for own in each.own_pools.values() for pool in own]
        refuse_taken_pools(facts, taken)
        found.append(facts)
    return tuple(found)


def refuse_taken_pools(facts: ModelFacts, taken: Iterable[str]) -> None:
    """Refuse pools whose names others have: metrics and routing know a pool by its name.

    Raises:
        ConfigurationError: Names the first of them.
    """
    own = [pool.name for pools in facts.own_pools.values() for pool in pools]
    for name in sorted(set(own) & {"pipeline", *taken}):
        raise ConfigurationError(
            f"Model {facts.spec.name!r} has a pool {name!r}, and so has the service already.",
            field="pools",
            value=name,
            allowed="a name of its own for each pool of all models",
        )


def _lora_folders(model: ModelSettings) -> list[Path]:
    folders = (root / FOLDER for root in lora_roots(model))
    return [folder.resolve() for folder in folders if folder.is_dir()]


def like_the_services(service: Settings, stage: Stage, model: str) -> PoolSettings:
    """Return a pool like the service's first one of a stage, named after the model."""
    suffix = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    first = service.pools[stage][0]
    name = f"{SECTIONS[stage].replace('_', '-')}-{suffix}"
    # Sizes and rows to prepare are another model's.
    return first.model_copy(update={"name": name, "warm_sizes": (), "warm_rows": ()})
