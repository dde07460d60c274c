"""Claims to plain English: one of many phrasings, drawn at random."""

import random

from deployments.builtin.claims import WORD, Claims, RelationClaim, ThingClaim
from deployments.builtin.vocabulary import (
    BACKGROUND_NAMES,
    BACKGROUND_PREPOSITIONS,
    COLOR_NAMES,
    COUNT_NAMES,
    OPENINGS,
    PLURALS,
    POSITION_PHRASES,
    RELATION_PHRASES,
    ROW_PHRASES,
    SHAPE_NAMES,
    SIZE_NAMES,
    TAUGHT_PLURALS,
    TEXT_NOUNS,
)


def write(claims: Claims, rng: random.Random) -> str:
    """A caption that states exactly ``claims``, written words in capitals inside double quotes."""
    if not claims.things:
        return _background(claims, rng, bare=True)
    if not claims.exact:
        body = ", ".join(_keywords(thing, rng) for thing in claims.things)
    else:
        body = _sentence(claims, rng)
    if claims.background is None:
        return body
    draw = rng.random()
    if draw < 0.25:
        return f"{_background(claims, rng, bare=draw < 0.06)}, {body}"
    if draw < 0.4:
        return f"{body}, {_background(claims, rng, bare=True)}"
    return f"{body} {_background(claims, rng, bare=False)}"


def _mostly_first(names: tuple[str, ...], rng: random.Random) -> str:
    """The plain name three times in four, so that synonyms stay rare enough to learn late."""
    return names[0] if len(names) == 1 or rng.random() < 0.75 else rng.choice(names[1:])


def _background(claims: Claims, rng: random.Random, *, bare: bool) -> str:
    name = _mostly_first(BACKGROUND_NAMES[claims.background or ""], rng)
    if bare and rng.random() < 0.6:
        return f"{name} background"
    if bare:
        return f"a {name} background"
    return f"{_mostly_first(BACKGROUND_PREPOSITIONS, rng)} a {name} background"


def _adjectives(thing: ThingClaim, rng: random.Random) -> list[str]:
    names = [] if thing.size is None else [_mostly_first(SIZE_NAMES[thing.size], rng)]
    return names if thing.color is None else [*names, _mostly_first(COLOR_NAMES[thing.color], rng)]


def _shape_noun(thing: ThingClaim, rng: random.Random, *, plural: bool) -> str:
    shape = thing.shape or "shape"
    noun = _mostly_first(SHAPE_NAMES.get(shape, (shape,)), rng)
    return (PLURALS | TAUGHT_PLURALS)[noun] if plural else noun


def _noun_phrase(thing: ThingClaim, rng: random.Random) -> str:
    if thing.shape == WORD:
        return _word_phrase(thing, rng)
    count = thing.count or 1
    rest = [*_adjectives(thing, rng), _shape_noun(thing, rng, plural=count > 1)]
    if count > 1 or rng.random() < 0.06:
        determiner = _mostly_first(COUNT_NAMES[count], rng)
    else:
        determiner = "an" if rest[0][0] in "aeiou" else "a"
    return " ".join([determiner, *rest])


def _word_phrase(thing: ThingClaim, rng: random.Random) -> str:
    quoted = f'"{thing.text}"'
    draw = rng.random()
    if thing.color is None:
        return f"the word {quoted}" if draw < 0.75 else f"text that says {quoted}"
    color = _mostly_first(COLOR_NAMES[thing.color], rng)
    if draw < 0.6:
        return f"the word {quoted} in {color}"
    if draw < 0.75:
        return f"the word {quoted} in {color} letters"
    if draw < 0.9:
        return f"{color} text that says {quoted}"
    return f"{quoted} written in {color}"


def _keywords(thing: ThingClaim, rng: random.Random) -> str:
    """A few words that state only that there is some: "red", "blue circles", "text"."""
    adjectives = _adjectives(thing, rng)
    if thing.shape == WORD:
        return " ".join([*adjectives, _mostly_first(TEXT_NOUNS, rng)])
    if thing.shape is not None:
        return " ".join([*adjectives, _shape_noun(thing, rng, plural=rng.random() < 0.5)])
    return " ".join(adjectives if rng.random() < 0.6 else ["something", *adjectives])


def _sentence(claims: Claims, rng: random.Random) -> str:
    phrases = [_noun_phrase(thing, rng) for thing in claims.things]
    relations = claims.relations
    existence = "there is" if claims.things[0].count == 1 else "there are"
    opening = rng.choice((existence, *OPENINGS)) + " " if rng.random() < 0.2 else ""
    if _is_row(claims):
        row = _mostly_first(ROW_PHRASES[relations[0].relation], rng)
        if rng.random() < 0.3:
            return f"{row}: {_listed(phrases, rng)}"
        return f"{opening}{_listed(phrases, rng)} {row}"
    if len(relations) == 2:
        first, second = (_mostly_first(RELATION_PHRASES[r.relation], rng) for r in relations)
        return f"{opening}{phrases[0]} {first} {phrases[1]} and {second} {phrases[2]}"
    if len(relations) == 1:
        return _related(phrases, relations[0], opening, rng)
    placed = [
        phrase if thing.position is None else f"{phrase} {_position(thing.position, rng)}"
        for phrase, thing in zip(phrases, claims.things, strict=True)
    ]
    position = claims.things[0].position
    if len(placed) == 1 and position is not None and rng.random() < 0.2:
        joint = rng.choice((", ", " there is ", " is "))
        return f"{_position(position, rng)}{joint}{phrases[0]}"
    return opening + _listed(placed, rng)


def _position(position: str, rng: random.Random) -> str:
    return _mostly_first(POSITION_PHRASES[position], rng)


def _is_row(claims: Claims) -> bool:
    chain = tuple((index, index + 1) for index in range(len(claims.things) - 1))
    return len(chain) >= 2 and tuple((r.subject, r.object) for r in claims.relations) == chain


def _related(phrases: list[str], relation: RelationClaim, opening: str, rng: random.Random) -> str:
    middle = _mostly_first(RELATION_PHRASES[relation.relation], rng)
    if relation.subject == 1:
        # Mentioned last, so the sentence has to begin with the place.
        joint = rng.choice((" is ", " there is ", ", "))
        return f"{middle} {phrases[0]}{joint}{phrases[1]}"
    verb = "is " if not opening and rng.random() < 0.25 else ""
    return f"{opening}{phrases[0]} {verb}{middle} {phrases[1]}"


def _listed(phrases: list[str], rng: random.Random) -> str:
    last_joint = rng.choice((" and ", " and ", ", and ", ", "))
    if len(phrases) < 2:
        return phrases[0]
    return ", ".join(phrases[:-1]) + last_joint + phrases[-1]
