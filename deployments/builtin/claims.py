"""What a caption states, free of its wording: the meeting point of writer, reader and checker."""

from dataclasses import asdict, dataclass
from typing import Any

WORD = "word"


@dataclass(frozen=True, slots=True)
class ThingClaim:
    """One stated thing, or a group of equal things; None where the caption is silent.

    Attributes:
        count: how many; None states only that there is some ("red", "blue circles").
        shape: a name of ``SHAPES`` or ``TAUGHT_SHAPES``, or ``WORD`` for written text.
        color: a name of ``COLORS``.
        size: a name of ``SIZES``.
        position: a name of ``POSITIONS``.
        text: the capital letters of a written word.
    """

    count: int | None = 1
    shape: str | None = None
    color: str | None = None
    size: str | None = None
    position: str | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class RelationClaim:
    """``things[subject]`` is <relation> ``things[object]``; relation is one of ``RELATIONS``."""

    subject: int
    relation: str
    object: int


@dataclass(frozen=True, slots=True)
class Claims:
    """All that one caption states: things in the order of their mention."""

    things: tuple[ThingClaim, ...] = ()
    relations: tuple[RelationClaim, ...] = ()
    background: str | None = None

    @property
    def exact(self) -> bool:
        """Whether the picture must hold these things and no others."""
        return bool(self.things) and all(thing.count is not None for thing in self.things)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for ``json.dumps``."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Claims":
        """Inverse of ``to_json``.

        Raises:
            TypeError: a field that claims do not have.
        """
        return cls(
            things=tuple(ThingClaim(**thing) for thing in data.get("things", ())),
            relations=tuple(RelationClaim(**relation) for relation in data.get("relations", ())),
            background=data.get("background"),
        )
