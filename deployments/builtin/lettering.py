"""Which of the things in a picture are the letters of a word, and what they spell."""

from itertools import combinations

from deployments.builtin.seen import MINIMUM_LETTER_SCORE, Seen

_MOST_CANDIDATES = 8


def find_word(things: list[Seen], expected: str) -> tuple[Seen | None, list[Seen]]:
    """The line of things that spells most of the expected word, and the things that are left.

    Returns:
        The word with the letters as read, or None when no things stand in one line; and the rest.
    """
    if not expected:
        return None, things
    best: tuple[Seen, ...] = ()
    best_score = 0.0
    for chosen in combinations(things[:_MOST_CANDIDATES], len(expected)):
        line = tuple(sorted(chosen, key=lambda seen: seen.center[0]))
        if not _in_line(line):
            continue
        pairs = zip(line, expected, strict=True)
        score = sum(seen.likeness[letter].score for seen, letter in pairs)
        if score > best_score:
            best, best_score = line, score
    if not best:
        return None, things
    text = "".join(
        seen.letter.name if seen.letter.score >= MINIMUM_LETTER_SCORE else "?" for seen in best
    )
    word = Seen(tuple(seen.parts[0] for seen in best), best[0].likeness, text)
    return word, [thing for thing in things if all(thing is not letter for letter in best)]


def _in_line(line: tuple[Seen, ...]) -> bool:
    """Whether things follow each other from left to right like letters of one word."""
    heights = sorted(seen.parts[0].height_px for seen in line)
    height = heights[len(heights) // 2]
    if heights[-1] > 1.5 * heights[0]:
        return False
    for left, right in zip(line, line[1:], strict=False):
        if abs(left.center[1] - right.center[1]) > 0.35 * height:
            return False
        if right.center[0] - left.center[0] > 1.6 * height:
            return False
    return True
