"""The colours of the drawn world, as sRGB, and which go on which background.

The eleven object colours are the basic colour terms of English (Berlin and Kay, 1969), drawn at
their focal values; a person names each at once. Distances are CIE76 in CIELAB (D65).
"""

from deployments.builtin.vocabulary import BACKGROUNDS, COLORS

Rgb = tuple[int, int, int]

COLOR_RGB: dict[str, Rgb] = {
    "red": (220, 30, 40),
    "orange": (250, 130, 15),
    "yellow": (250, 220, 40),
    "green": (30, 155, 60),
    "blue": (25, 95, 225),
    "purple": (140, 40, 160),
    "pink": (250, 140, 195),
    "brown": (120, 70, 35),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
    "gray": (135, 135, 135),
}
BACKGROUND_RGB: dict[str, Rgb] = {
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (135, 135, 135),
    "cream": (250, 235, 195),
    "light blue": (160, 205, 245),
    "dark blue": (20, 30, 85),
}
# Below this an object's outline is weak after the autoencoder, and a person has to look twice.
MINIMUM_CONTRAST = 41.0


def rgb_to_lab(rgb: Rgb) -> tuple[float, float, float]:
    """CIELAB (D65) of one 8-bit sRGB colour; IEC 61966-2-1 and CIE 15."""
    linear = []
    for value in rgb:
        unit = value / 255.0
        linear.append(unit / 12.92 if unit <= 0.04045 else ((unit + 0.055) / 1.055) ** 2.4)
    red, green, blue = linear
    ratios = (
        (0.4124564 * red + 0.3575761 * green + 0.1804375 * blue) / 0.95047,
        0.2126729 * red + 0.7151522 * green + 0.0721750 * blue,
        (0.0193339 * red + 0.1191920 * green + 0.9503041 * blue) / 1.08883,
    )
    x, y, z = (t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116 for t in ratios)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def lab_distance(first: Rgb, second: Rgb) -> float:
    """CIE76 distance between two 8-bit sRGB colours."""
    pairs = zip(rgb_to_lab(first), rgb_to_lab(second), strict=True)
    return float(sum((a - b) ** 2 for a, b in pairs) ** 0.5)


# color -> backgrounds that it stands out on
BACKGROUNDS_FOR: dict[str, frozenset[str]] = {
    color: frozenset(
        background
        for background in BACKGROUNDS
        if lab_distance(COLOR_RGB[color], BACKGROUND_RGB[background]) >= MINIMUM_CONTRAST
    )
    for color in COLORS
}
