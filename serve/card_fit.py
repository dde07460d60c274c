"""Refuses pools that cannot fit their cards, with the arithmetic, before anything is started.

Ray books shares of a card and knows nothing of memory: any replicas whose shares of one kind of
card add up to a whole may come to lie on one. So the most that they can take together is compared
with the card. What a replica takes is reckoned as `kelvin doctor` does, from the files' headers,
with the denoiser's forwards at its largest warm size and rows. Pools that name no kind of card, or
one whose memory is not known, are not judged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from cluster.card_kinds import KINDS, card_kind
from cluster.pool_state import Stage
from serve.checkpoints.key_names import Kind
from serve.checkpoints.memory import GIB, StageNeeds, stage_needs
from serve.checkpoints.part import Part
from serve.config import ModelSettings, PoolSettings
from serve.errors import ConfigurationError
from serve.model_dir import model_files, model_name, resolve_model_dir
from serve.models import Defaults, ModelSpec

_SHARES = 10_000  # of a card: as finely as Ray divides one
_GUIDED_ROWS = 2

Pools = Mapping[Stage, tuple[PoolSettings, ...]]


@dataclass(frozen=True)
class _Replica:
    """What one replica of a pool takes of its card."""

    pool: PoolSettings
    needs: StageNeeds

    @property
    def share(self) -> float:
        return min(self.pool.num_gpus, 1.0)

    def __str__(self) -> str:
        return f"{self.pool.name} {self.needs}, on {self.share:g} of the card"


def refuse_what_cannot_fit(models: Iterable[tuple[ModelSettings, Pools]]) -> None:
    """Refuse pools whose replicas do not fit the memory of their kind of card.

    Args:
        models: Each with the pools that are its own.

    Raises:
        ConfigurationError: Naming the pool, the GiB that it and those that may share its card take,
            the GiB of the card and the shares; or a model's files cannot be read.
    """
    replicas: list[_Replica] = []
    for settings, pools in models:
        if any(_is_judged(pool) for stage in pools.values() for pool in stage):
            replicas += _replicas_of(settings, pools)
    replicas.sort(key=_kind)
    for kind, group in groupby(replicas, key=_kind):
        _refuse_overfull(kind, list(group))


def _is_judged(pool: PoolSettings) -> bool:
    if not pool.num_gpus or pool.accelerator_type is None:
        return False
    return card_kind(pool.accelerator_type).memory_gib is not None


def _kind(replica: _Replica) -> str:
    return str(replica.pool.accelerator_type)


def _replicas_of(settings: ModelSettings, pools: Pools) -> list[_Replica]:
    folder = resolve_model_dir(settings, weights=False)
    defaults = ModelSpec.from_directory(folder, model_name(settings)).defaults
    parts = {kind: found.part for kind, found in model_files(settings, weights=False).parts.items()}
    return [
        _Replica(pool, _needs(stage, pool, parts, defaults))
        for stage, those in pools.items()
        for pool in those
        if _is_judged(pool)
    ]


def _needs(
    stage: Stage, pool: PoolSettings, parts: Mapping[Kind, Part], defaults: Defaults
) -> StageNeeds:
    sizes = pool.warm_sizes or ((defaults.width, defaults.height),)
    guided = defaults.guidance_scale > 1
    needs = stage_needs(
        stage,
        parts,
        pool.precision,
        pixels=max(width * height for width, height in sizes),
        text_tokens=defaults.max_sequence_length,
        rows=max(pool.warm_rows, default=_GUIDED_ROWS if guided else 1),
    )
    if stage == "decode" and pool.decode_tiling != "off":
        return needs.at_most(int(pool.decode_memory_gib * GIB))
    return needs


def _refuse_overfull(kind: str, replicas: list[_Replica]) -> None:
    there = (card_kind(kind).memory_gib or 0.0) * GIB
    for replica in replicas:
        if replica.needs.total > there:
            raise ConfigurationError(
                f"A replica of {replica} does not fit: {replica.needs.total / GIB:.1f} GiB are"
                f" needed, and a card of kind {kind} has {there / GIB:.1f}.",
                field=f"{replica.pool.name}.accelerator_type",
                value=kind,
                allowed=_kinds_with(replica.needs.total),
            )
    together = _most_on_one_card(replicas)
    needed = sum(replica.needs.total for replica in together)
    if needed > there:
        largest = max(together, key=lambda replica: replica.needs.total)
        counts = Counter(map(str, together))
        told = "; ".join(f"{number} x {each}" for each, number in counts.items())
        raise ConfigurationError(
            f"Ray may put these on one card of kind {kind}, which has {there / GIB:.1f} GiB, and"
            f" they take {needed / GIB:.1f}: {told}.",
            field=f"{largest.pool.name}.num_gpus",
            value=largest.pool.num_gpus,
            allowed=f"shares that let at most {there / GIB:.1f} GiB onto one card; "
            f"{largest.needs.total / there:.2f} or more is this pool's own part",
        )


def _kinds_with(needed: int) -> str:
    enough = [name for name, kind in KINDS.items() if (kind.memory_gib or 0.0) * GIB >= needed]
    if not enough:
        return "smaller warm_sizes and warm_rows: no known kind of card has so much"
    return f"{', '.join(enough)}; or smaller warm_sizes, fewer warm_rows, precision fp8"


def _most_on_one_card(replicas: list[_Replica]) -> tuple[_Replica, ...]:
    """Return those that take the most memory of all that Ray may put on one card."""
    best: dict[int, tuple[int, tuple[_Replica, ...]]] = {0: (0, ())}
    for replica in replicas:
        share = max(1, round(replica.share * _SHARES))
        for _ in range(min(replica.pool.most_replicas, _SHARES // share)):
            for used, (taken, who) in list(best.items()):
                both = used + share
                more = taken + replica.needs.total
                if both <= _SHARES and more > best.get(both, (0, ()))[0]:
                    best[both] = (more, (*who, replica))
    return max(best.values(), key=lambda each: each[0])[1]
