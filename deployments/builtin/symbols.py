"""A prompt cut into the longest known phrases, each with what it means."""

import re
from dataclasses import dataclass
from functools import cache

from deployments.builtin import vocabulary
from deployments.builtin.read_errors import PromptError, UnknownWordError

_TOKEN = re.compile(r'"[^"]*"|[A-Za-z]+|\d+|\S')
_SPELLINGS = {"centre": "center"}
_ENDS = frozenset(".;!")


@dataclass(frozen=True, slots=True)
class Symbol:
    """One phrase: its sort ("shape", "relation", ...) and the canonical name of what it says."""

    sort: str
    value: str = ""


@cache
def _phrases() -> dict[tuple[str, ...], Symbol]:
    table: dict[str, Symbol] = {}
    for shape, names in vocabulary.SHAPE_NAMES.items():
        for name in names:
            table[name] = table[vocabulary.PLURALS[name]] = Symbol("shape", shape)
    for shape, plural in vocabulary.TAUGHT_PLURALS.items():
        table[shape] = table[plural] = Symbol("shape", shape)
    table["shape"] = table[vocabulary.PLURALS["shape"]] = Symbol("shape")
    sorts: tuple[tuple[str, dict[str, tuple[str, ...]]], ...] = (
        ("color", vocabulary.COLOR_NAMES),
        ("size", vocabulary.SIZE_NAMES),
        ("position", vocabulary.POSITION_PHRASES),
        ("relation", vocabulary.RELATION_PHRASES),
        ("row", vocabulary.ROW_PHRASES),
    )
    for sort, meanings in sorts:
        for meaning, names in meanings.items():
            table |= {name: Symbol(sort, meaning) for name in names}
    for count, names in vocabulary.COUNT_NAMES.items():
        table |= {name: Symbol("count", str(count)) for name in names}
    for background, names in vocabulary.BACKGROUND_NAMES.items():
        for start in ("", *(f"{word} " for word in vocabulary.BACKGROUND_PREPOSITIONS)):
            for article in ("", "a ", "the "):
                for name in names:
                    phrase = f"{start}{article}{name} background"
                    table[phrase] = Symbol("background", background)
    for side in ("left", "right"):
        table[f"on the {side} of"] = Symbol("relation", f"{side} of")
    table |= {noun: Symbol("text") for noun in vocabulary.TEXT_NOUNS}
    table |= {word: Symbol("determiner") for word in ("a", "an", "the")}
    table |= {phrase: Symbol("filler") for phrase in vocabulary.OPENINGS}
    table |= {phrase: Symbol("filler") for phrase in ("there is", "there are", "is", "are", ":")}
    table |= {phrase: Symbol("joint") for phrase in ("and", ",")}
    table |= {
        "something": Symbol("something"),
        "word": Symbol("word"),
        "that says": Symbol("says"),
        "in": Symbol("in"),
        "written in": Symbol("in"),
    }
    return {tuple(phrase.split()): symbol for phrase, symbol in table.items()}


@cache
def _known_words() -> frozenset[str]:
    return frozenset(word for phrase in _phrases() for word in phrase)


def symbols(prompt: str) -> list[Symbol]:
    """The prompt's phrases in order.

    Raises:
        UnknownWordError: a word that is in no phrase.
        PromptError: a known word that begins no phrase where it stands.
    """
    tokens = []
    for token in _TOKEN.findall(prompt.replace("-", " ")):
        if not token.startswith('"'):
            token = _SPELLINGS.get(token.lower(), token.lower())
            if token in _ENDS:
                continue
            if token not in _known_words():
                raise UnknownWordError(prompt, token)
        elif len(token) == 1:
            raise PromptError(prompt, "a double quote is not closed")
        tokens.append(token)
    table = _phrases()
    longest = max(map(len, table))
    found: list[Symbol] = []
    at = 0
    while at < len(tokens):
        if tokens[at].startswith('"'):
            found.append(Symbol("quoted", tokens[at].strip('"')))
            at += 1
            continue
        for length in range(min(longest, len(tokens) - at), 0, -1):
            symbol = table.get(tuple(tokens[at : at + length]))
            if symbol is not None:
                found.append(symbol)
                at += length
                break
        else:
            raise PromptError(prompt, f"{tokens[at]!r} does not fit where it stands")
    return found
