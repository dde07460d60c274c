"""Scenes of which little is said, as in negative prompts: "red", "two hearts", "text"."""

from deployments.builtin.claims import ThingClaim
from deployments.builtin.compose import Composed, Draft, finish, scatter


def keywords(draft: Draft) -> Composed | None:
    """One to three things of which only a feature or two is said, with no count."""
    rng = draft.rng
    number = rng.choice((1, 1, 2, 3))
    looks, sizes = draft.looks(number), draft.sizes(number, 1.0)
    claims: list[ThingClaim] = []
    mentioned = looks[:] if draft.forced.pair is None else [draft.forced.pair]
    for look in mentioned[: rng.choice((1, 1, 2))]:
        (shape, color), size = look, sizes[looks.index(look)][0]
        sort = rng.random() if draft.forced.pair is None else 0.7
        claim = ThingClaim(
            None,
            None if sort < 0.35 else shape,
            None if 0.35 <= sort < 0.65 else color,
            size if rng.random() < 0.15 else None,
        )
        if claim not in claims:
            claims.append(claim)
    halves = [half for _, half in sizes]
    centers = scatter(draft, [None] * number, halves)
    return finish(draft, looks, halves, centers, tuple(claims), background_chance=0.15)


def bare_count(draft: Draft) -> Composed | None:
    """A star, two hearts, three small shapes: exact in number, silent in most else."""
    rng = draft.rng
    number = rng.choice((1, 1, 1, 2, 2, 3, 4))
    looks, (size, half) = draft.looks(number), draft.sizes(1, 0.3)[0]
    shape, color = looks[0] if draft.forced.pair is None else draft.forced.pair
    sort = rng.random() if draft.forced.pair is None else 0.9
    if sort < 0.4:
        looks = [(shape, look[1]) for look in looks]
        claim = ThingClaim(number, shape, None, size)
    elif sort < 0.6:
        looks = [(look[0], color) for look in looks]
        claim = ThingClaim(number, None, color, size)
    elif sort < 0.7:
        claim = ThingClaim(number, None, None, size)
    else:
        looks = [(shape, color)] * number
        claim = ThingClaim(number, shape, color, size)
    halves = [half] * number
    centers = scatter(draft, [None] * number, halves)
    return finish(draft, looks, halves, centers, (claim,), background_chance=0.15)


def only_background(draft: Draft) -> Composed | None:
    """Any scene of one or two things, of which only the background is said."""
    number = draft.rng.choice((1, 2))
    looks, sizes = draft.looks(number), draft.sizes(number, 0.0)
    halves = [half for _, half in sizes]
    centers = scatter(draft, [None] * number, halves)
    return finish(draft, looks, halves, centers, (), background_chance=1.0)
