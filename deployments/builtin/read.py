"""Plain English of the drawn world back to claims: for prompts that people type.

Reads what the caption writer writes and some freedom around it (order of phrases, "centre",
hyphens, capitals), without sharing code with it: a prompt is cut into the longest known phrases,
and one pass over these symbols collects things, places and relations.
"""

import re
from dataclasses import replace

from deployments.builtin.claims import WORD, Claims, RelationClaim, ThingClaim
from deployments.builtin.read_errors import PromptError, UnknownWordError
from deployments.builtin.symbols import Symbol, symbols

__all__ = ["PromptError", "UnknownWordError", "read_claims"]

_MAXIMUM_LETTERS = 4


def read_claims(prompt: str) -> Claims:
    """What a prompt of this world's grammar states.

    Raises:
        UnknownWordError: a word that the world does not know; ``.word`` names it.
        PromptError: known words in an order that states nothing or cannot be read.
    """
    return _Reader(prompt).read()


class _Reader:
    def __init__(self, prompt: str) -> None:
        self._prompt = prompt
        self._symbols = symbols(prompt)
        self._at = 0
        self._things: list[ThingClaim] = []
        self._relations: list[RelationClaim] = []
        self._background: str | None = None
        self._row: str | None = None
        self._position: str | None = None
        # A relation that waits for its object: (subject, or None at the start, relation).
        self._waiting: tuple[int | None, str] | None = None

    def read(self) -> Claims:
        while (symbol := self._peek()) is not None:
            if symbol.sort == "background":
                self._state_background(self._take().value)
            elif symbol.sort == "position":
                self._place(self._take().value)
            elif symbol.sort == "relation":
                self._relate(self._take().value)
            elif symbol.sort == "row":
                self._row = self._take().value
            elif symbol.sort in ("joint", "filler"):
                self._at += 1
            else:
                self._add(self._noun_phrase())
        if self._waiting is not None or self._position is not None:
            raise PromptError(self._prompt, "a place is named, but not what is there")
        if self._row is not None:
            if self._relations or len(self._things) < 2:
                raise PromptError(self._prompt, "a row needs two things and no other relation")
            self._relations = [
                RelationClaim(index, self._row, index + 1) for index in range(len(self._things) - 1)
            ]
        claims = Claims(tuple(self._things), tuple(self._relations), self._background)
        if claims == Claims():
            raise PromptError(self._prompt, "it states nothing")
        return claims

    def _peek(self, *sorts: str) -> Symbol | None:
        """The next symbol, if there is one and it is of the given sorts (any, when none given)."""
        if self._at >= len(self._symbols):
            return None
        symbol = self._symbols[self._at]
        return symbol if not sorts or symbol.sort in sorts else None

    def _take(self) -> Symbol:
        self._at += 1
        return self._symbols[self._at - 1]

    def _state_background(self, name: str) -> None:
        if self._background not in (None, name):
            raise PromptError(self._prompt, "it names two backgrounds")
        self._background = name

    def _place(self, position: str) -> None:
        # "a star in the center" places the star; a place that comes first waits for its thing.
        if self._things and self._things[-1].position is None and self._waiting is None:
            self._things[-1] = replace(self._things[-1], position=position)
        elif self._position is None:
            self._position = position
        else:
            raise PromptError(self._prompt, "two places in a row")

    def _relate(self, relation: str) -> None:
        if self._waiting is not None:
            raise PromptError(self._prompt, "two relations in a row")
        subject = len(self._things) - 1 if self._things else None
        previous = self._symbols[self._at - 2] if self._at >= 2 else None
        if self._relations and previous is not None and previous.sort == "joint":
            # "A left of B and above C": A is above C.
            subject = self._relations[-1].subject
        self._waiting = (subject, relation)

    def _add(self, thing: ThingClaim) -> None:
        index = len(self._things)
        if self._position is not None:
            thing, self._position = replace(thing, position=self._position), None
        self._things.append(thing)
        if self._waiting is None:
            return
        subject, relation = self._waiting
        if subject is not None:
            self._relations.append(RelationClaim(subject, relation, index))
            self._waiting = None
        elif index == 1:
            # "left of B is A": B came first.
            self._relations.append(RelationClaim(1, relation, 0))
            self._waiting = None

    def _noun_phrase(self) -> ThingClaim:
        begin = self._at
        count: int | None = None
        adjectives: dict[str, str] = {}
        something = False
        while (
            symbol := self._peek("determiner", "count", "something", "size", "color")
        ) is not None:
            self._at += 1
            if symbol.sort == "determiner":
                count = 1
            elif symbol.sort == "count":
                count = int(symbol.value)
            elif symbol.sort == "something":
                something = True
            elif symbol.sort in adjectives:
                raise PromptError(self._prompt, f"two words for the {symbol.sort} of one thing")
            else:
                adjectives[symbol.sort] = symbol.value
        color, size = adjectives.get("color"), adjectives.get("size")
        noun = None if something else self._peek("shape", "text", "word", "quoted")
        if noun is None:
            if count is not None or not adjectives:
                named = self._symbols[min(begin, len(self._symbols) - 1)].value
                raise PromptError(self._prompt, f"what is meant by {named!r}?")
            return ThingClaim(None, None, color, size)
        if noun.sort == "shape":
            self._at += 1
            return ThingClaim(count, noun.value or None, color, size)
        if size is not None:
            raise PromptError(self._prompt, "words have no stated size")
        return self._text(color)

    def _text(self, color: str | None) -> ThingClaim:
        """``the word "CAT" in blue letters``, ``blue text that says "CAT"``, ``blue text``."""
        if self._peek("text", "word") is not None:
            self._at += 1
        if self._peek("says") is not None:
            self._at += 1
        text: str | None = None
        if self._peek("quoted") is not None:
            text = self._take().value.upper()
            if not re.fullmatch(rf"[A-Z]{{1,{_MAXIMUM_LETTERS}}}", text):
                raise PromptError(
                    self._prompt, f"a written word has 1 to {_MAXIMUM_LETTERS} letters A to Z"
                )
        if self._peek("in") is not None:
            self._at += 1
            if self._peek("color") is None or color is not None:
                raise PromptError(self._prompt, "a colour should follow 'in'")
            color = self._take().value
            if self._peek("text") is not None:
                self._at += 1
        return ThingClaim(None if text is None else 1, WORD, color, text=text)
