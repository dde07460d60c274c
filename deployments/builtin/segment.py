"""A picture to its background and the separate things on it, by colour alone.

Autoencoder and denoiser leave soft edges, small shifts of colour and specks; a person sees through
these, so edges are cut half way between background and thing, gaps of two pixels are bridged, and
specks of less than some 8x8 pixels are not things.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from deployments.builtin.palette import BACKGROUND_RGB, COLOR_RGB, rgb_to_lab
from deployments.builtin.scene import frame_scale

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

_BORDER_PX = 3
# CIE76 from the background at which a pixel may belong to a thing: under half of the least
# contrast in the palette, over what noise, JPEG and the autoencoder leave on flat ground.
_FOREGROUND_DISTANCE = 17.0
# 8-bit steps that no colour 17 away stays below.
_LEAST_CHANGE = 10
_SPECK_PX = 64.0


@dataclass(frozen=True, slots=True)
class Part:
    """One separate thing.

    Attributes:
        coverage: float32 [h, w] in 0..1, how far each pixel of its box is the thing's colour.
        left: the box's first column in the picture.
        top: the box's first row in the picture.
        color: the nearest name of ``COLORS`` to most of its inside.
        purity: share of its inside that is nearest to that colour.
    """

    coverage: Floats
    left: int
    top: int
    color: str
    purity: float

    @property
    def area_px(self) -> float:
        """Covered pixels."""
        return float(self.coverage.sum())

    @property
    def extents(self) -> tuple[float, float, float, float]:
        """First and last column, first and last row in the picture, in pixels."""
        solid = self.coverage > 0.5
        columns, rows = np.flatnonzero(solid.any(0)), np.flatnonzero(solid.any(1))
        return (
            self.left + float(columns[0]),
            self.left + float(columns[-1]) + 1.0,
            self.top + float(rows[0]),
            self.top + float(rows[-1]) + 1.0,
        )

    @property
    def center(self) -> tuple[float, float]:
        """Middle of the box, (x, y) in pixels."""
        x0, x1, y0, y1 = self.extents
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def height_px(self) -> float:
        """Height of the box."""
        return self.extents[3] - self.extents[2]


@cache
def _linear() -> Floats:
    """Linear light of every 8-bit sRGB value, float32 [256]."""
    unit = np.arange(256, dtype=np.float32) / 255.0
    curve = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    return curve.astype(np.float32)


def to_lab(rgb: npt.NDArray[np.generic]) -> Floats:
    """CIELAB (D65) of 8-bit sRGB [..., 3]; same formula as ``palette.rgb_to_lab``."""
    matrix = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ],
        dtype=np.float32,
    ) / np.array([[0.95047], [1.0], [1.08883]], dtype=np.float32)
    ratios = _linear()[rgb.astype(np.uint8)] @ matrix.T
    curved = np.where(ratios > 216 / 24389, np.cbrt(ratios), (24389 / 27 * ratios + 16) / 116)
    x, y, z = curved[..., 0], curved[..., 1], curved[..., 2]
    lab: Floats = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
    return lab.astype(np.float32)


@cache
def _palette(background: bool) -> tuple[tuple[str, ...], Floats]:
    table = BACKGROUND_RGB if background else COLOR_RGB
    return tuple(table), np.array([rgb_to_lab(rgb) for rgb in table.values()], dtype=np.float32)


def _nearest(lab: Floats, *, background: bool) -> npt.NDArray[np.intp]:
    _, known = _palette(background)
    nearest: npt.NDArray[np.intp] = np.argmin(((lab[..., None, :] - known) ** 2).sum(-1), axis=-1)
    return nearest


def background_of(image: Bytes) -> tuple[str, Floats]:
    """The nearest name of ``BACKGROUNDS`` to the frame's border, and its colour, float32 [3]."""
    edge = _BORDER_PX
    border = np.concatenate(
        [
            image[:edge].reshape(-1, 3),
            image[-edge:].reshape(-1, 3),
            image[:, :edge].reshape(-1, 3),
            image[:, -edge:].reshape(-1, 3),
        ]
    )
    color = np.median(border, axis=0).astype(np.float32)
    names, _ = _palette(True)
    return names[int(_nearest(to_lab(color), background=True))], color


def find_parts(image: Bytes, ground: Floats) -> list[Part]:
    """Separate things on a ground colour, largest first.

    Args:
        image: uint8 [height, width, 3].
        ground: the background's colour, float32 [3], 0..255.
    """
    # Converting to Lab is most of the cost; ground differs by less than this in every channel.
    differs = (np.abs(image.astype(np.int16) - ground.astype(np.int16)) > _LEAST_CHANGE).any(-1)
    distance = ((to_lab(image[differs]) - to_lab(ground.round())) ** 2).sum(-1) ** 0.5
    foreground = np.zeros(image.shape[:2], bool)
    foreground[differs] = distance > _FOREGROUND_DISTANCE
    scale = frame_scale(image.shape[0], image.shape[1])
    least = _SPECK_PX * scale**2
    parts = []
    for box, mask in _connected(foreground, least):
        parts += _split_part(image, ground, box, mask, least)
    return sorted(parts, key=lambda part: -part.area_px)


def _connected(mask: Mask, least: float) -> list[tuple[tuple[slice, slice], Mask]]:
    """Boxes (two pixels wider on every side) and masks of connected areas of ``least`` pixels."""
    bridged = ndimage.binary_dilation(mask, np.ones((3, 3), bool))
    labels, _ = ndimage.label(bridged)
    found = []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        wide = tuple(
            slice(max(side.start - 2, 0), min(side.stop + 2, length))
            for side, length in zip(box, mask.shape, strict=True)
        )
        own = (labels[wide] == index) & mask[wide]
        if own.sum() >= least:
            found.append(((wide[0], wide[1]), own))
    return found


def _split_part(
    image: Bytes,
    ground: Floats,
    box: tuple[slice, slice],
    mask: Mask,
    least: float,
) -> list[Part]:
    """Cut an area's soft edge half way to the ground; what a halo joined falls apart again."""
    inside = ndimage.binary_erosion(mask, iterations=2)
    if inside.sum() < 12:
        inside = mask
    names, _ = _palette(False)
    color = np.median(image[box][inside], axis=0).astype(np.float32)
    contrast = color - ground
    step = float((contrast**2).sum())
    if step < 1.0:
        return []
    coverage = ((image[box].astype(np.float32) - ground) @ contrast / step).clip(0.0, 1.0)
    parts = []
    around = ndimage.binary_dilation(mask, iterations=1)
    for piece, own in _connected(around & (coverage > 0.5), least):
        halo = ndimage.binary_dilation(own, iterations=2)
        part = np.where(halo, coverage[piece], 0.0).astype(np.float32)
        core = ndimage.binary_erosion(own, iterations=1)
        core = core if core.sum() >= 12 else own
        votes = np.bincount(
            _nearest(to_lab(image[box][piece][core]), background=False), minlength=len(names)
        )
        top = int(votes.argmax())
        parts.append(
            Part(
                part,
                box[1].start + piece[1].start,
                box[0].start + piece[0].start,
                names[top],
                float(votes[top] / votes.sum()),
            )
        )
    return parts
