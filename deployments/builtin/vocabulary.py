"""Every word of the drawn world, and the phrases that its captions are made of.

The caption writer, the reader of typed prompts and the tokenizers share this table and nothing
else, so the reader stays an independent check of the writer.

A written word is spelled in capital letters inside double quotes: ``the word "CAT" in blue``.
Everything outside the quotes is lower case.
"""

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
# Shapes that the model does not know unless a LoRA teaches them: they can be drawn, read and looked
# for, but have no token, and are looked for only where a prompt names them.
TAUGHT_SHAPES = ("bolt",)
COLORS = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
    "gray",
)
BACKGROUNDS = ("white", "black", "gray", "cream", "light blue", "dark blue")
POSITIONS = (
    "left",
    "right",
    "top",
    "bottom",
    "center",
    "top left",
    "top right",
    "bottom left",
    "bottom right",
)
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE_RELATION = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}

SHAPE_NAMES = {
    **{shape: (shape,) for shape in SHAPES},
    "moon": ("moon", "crescent"),
}
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "heart": "hearts",
    "cross": "crosses",
    "ring": "rings",
    "moon": "moons",
    "crescent": "crescents",
    "shape": "shapes",
}
TAUGHT_PLURALS = {"bolt": "bolts"}
COLOR_NAMES = {**{color: (color,) for color in COLORS}, "gray": ("gray", "grey")}
BACKGROUND_NAMES = {
    **{background: (background,) for background in BACKGROUNDS},
    "gray": ("gray", "grey"),
    "cream": ("cream", "beige"),
}
SIZE_NAMES: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
}
COUNT_NAMES: dict[int, tuple[str, ...]] = {
    1: ("one",),
    2: ("two", "2"),
    3: ("three", "3"),
    4: ("four", "4"),
}

_SIDES = {"left": ("left",), "right": ("right",)}
_ENDS = {"top": ("top", "upper"), "bottom": ("bottom", "lower")}
POSITION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "near the top", "on the top"),
    "bottom": ("at the bottom", "near the bottom", "on the bottom"),
    "center": ("in the center", "in the middle", "at the center"),
    **{
        f"{end} {side}": tuple(
            f"{start} {end_name} {side}{tail}"
            for end_name in _ENDS[end]
            for start, tail in (("in the", " corner"), ("in the", ""), ("at the", ""))
        )
        for end in _ENDS
        for side in _SIDES
    },
}
RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
ROW_PHRASES: dict[str, tuple[str, ...]] = {
    "left of": ("from left to right", "in a row from left to right"),
    "above": ("from top to bottom", "in a column from top to bottom"),
}
OPENINGS = ("a picture of", "a drawing of", "an image of")
BACKGROUND_PREPOSITIONS = ("on", "against", "with")
TEXT_NOUNS = ("text", "letters", "words")
FUNCTION_WORDS = (
    "a",
    "an",
    "the",
    "and",
    "is",
    "are",
    "there",
    "in",
    "background",
    "something",
    "word",
    "that",
    "says",
    "written",
    "shape",
)
PUNCTUATION = (",", ":", '"')

_REAL_WORDS = (
    "ART BAG BALL BAT BEE BELL BIRD BLUE BOAT BOOK BOX BUS CAFE CAKE CAR CAT CITY COLD CUP DAY "
    "DEER DOG DOOR DUCK EGG EXIT FARM FISH FOX FROG FUN GAME GIFT GO GOLD GYM HAT HELP HI HOME "
    "HOT ICE JAM JAZZ JOY KEY KING KIWI LAMP LION LOVE MAP MILK MOON NEW NO OAK ONE OPEN OWL "
    "PARK PEN PIG PLAY QUIZ RAIN RAY RUN SALE SEA SHOP SKY SNOW STAR STOP SUN TAXI TEA TREE UP "
    "VAN VOTE WAVE WIN YES ZEN ZOO"
)
WRITTEN_WORDS = tuple(_REAL_WORDS.split())


def words() -> tuple[str, ...]:
    """Every lower-case word that a caption can hold outside double quotes, sorted."""
    phrases: list[str] = [*FUNCTION_WORDS, *OPENINGS, *BACKGROUND_PREPOSITIONS, *TEXT_NOUNS]
    phrases += [*PLURALS, *PLURALS.values()]
    tables: tuple[dict[str, tuple[str, ...]], ...] = (
        SHAPE_NAMES,
        COLOR_NAMES,
        BACKGROUND_NAMES,
        SIZE_NAMES,
        POSITION_PHRASES,
        RELATION_PHRASES,
        ROW_PHRASES,
    )
    for table in tables:
        for names in table.values():
            phrases += names
    for numerals in COUNT_NAMES.values():
        phrases += numerals
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))
