"""Scenes to pixels, a whole batch at once, on any torch device.

Every thing and letter is drawn in a small patch around its centre, all of one shape together, and
pasted into a padded canvas slot by slot. One slot holds at most one item of each scene, so no two
writes of a paste meet and the result does not depend on the order of execution.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from deployments.builtin.glyphs import LETTERS, glyph_distance
from deployments.builtin.palette import BACKGROUND_RGB, COLOR_RGB
from deployments.builtin.scene import LETTER_GAP, LETTER_WIDTH, Scene, word_half_extents
from deployments.builtin.shapes import SHAPE_DISTANCES

_PATCH_MARGIN_PX = 2


class _Item(NamedTuple):
    scene: int
    slot: int
    name: str
    scale_px: float
    center_x: float
    center_y: float
    rgb: tuple[int, int, int]


def draw(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> torch.Tensor:
    """Draw scenes of one frame size with flat colours and antialiased edges.

    Returns:
        uint8 [N, 3, height, width] on ``device``.

    Raises:
        ValueError: no scenes, or scenes of different frame sizes.
    """
    if len({(scene.height, scene.width) for scene in scenes}) != 1:
        raise ValueError("draw needs scenes, all of one height and width")
    height, width = scenes[0].height, scenes[0].width
    things, letters = _items(scenes)
    half_patch = _PATCH_MARGIN_PX + math.ceil(
        max([item.scale_px for item in things] + [item.scale_px / 2 for item in letters], default=0)
    )
    grounds = torch.tensor(
        [BACKGROUND_RGB[scene.background] for scene in scenes], dtype=torch.uint8
    ).to(device)
    padded = (height + 2 * half_patch, width + 2 * half_patch)
    canvas = grounds[:, None, None, :].expand(-1, *padded, -1).contiguous()
    for items, coverage in ((things, _shape_coverage), (letters, _letter_coverage)):
        if items:
            _paste(canvas, items, coverage(items, half_patch, canvas.device), grounds, half_patch)
    frame = canvas[:, half_patch : half_patch + height, half_patch : half_patch + width]
    return frame.permute(0, 3, 1, 2).contiguous()


def _items(scenes: Sequence[Scene]) -> tuple[list[_Item], list[_Item]]:
    things, letters = [], []
    for index, scene in enumerate(scenes):
        for slot, thing in enumerate(scene.things):
            box = (thing.half_width_px, thing.center_x, thing.center_y)
            things.append(_Item(index, slot, thing.shape, *box, COLOR_RGB[thing.color]))
        if scene.word is not None:
            word = scene.word
            size = word.letter_height_px
            left = word.center_x - word_half_extents(len(word.text), size)[0]
            for slot, letter in enumerate(word.text):
                x = left + (slot * (LETTER_WIDTH + LETTER_GAP) + LETTER_WIDTH / 2) * size
                box = (size, x, word.center_y)
                letters.append(_Item(index, slot, letter, *box, COLOR_RGB[word.color]))
    return things, letters


def _patch_coordinates(
    items: list[_Item], half_patch: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixel offsets right and down of each item's centre [M, P, P], and its scale [M, 1, 1]."""
    boxes = torch.tensor([[i.center_x, i.center_y, i.scale_px] for i in items]).to(device)
    pixels = torch.arange(-half_patch, half_patch, device=device) + 0.5
    offsets = pixels[None, :] - (boxes[:, :2] - boxes[:, :2].floor())[:, :, None]
    side = 2 * half_patch
    right = offsets[:, 0, None, :].expand(-1, side, -1)
    down = offsets[:, 1, :, None].expand(-1, -1, side)
    return right, down, boxes[:, 2, None, None]


def _coverage(distance_px: torch.Tensor) -> torch.Tensor:
    return (0.5 - distance_px).clamp(0.0, 1.0)


def _shape_coverage(items: list[_Item], half_patch: int, device: torch.device) -> torch.Tensor:
    right, down, scale = _patch_coordinates(items, half_patch, device)
    coverage = torch.zeros_like(right)
    for shape, distance in SHAPE_DISTANCES.items():
        rows = [row for row, item in enumerate(items) if item.name == shape]
        if rows:
            chosen = torch.tensor(rows).to(device)
            size = scale[chosen]
            apart = distance(right[chosen] / size, down[chosen] / size)
            coverage[chosen] = _coverage(apart * size)
    return coverage


def _letter_coverage(items: list[_Item], half_patch: int, device: torch.device) -> torch.Tensor:
    right, down, scale = _patch_coordinates(items, half_patch, device)
    names = torch.tensor([LETTERS.index(item.name) for item in items]).to(device)
    apart = glyph_distance(names, right / scale + LETTER_WIDTH / 2, down / scale + 0.5)
    return _coverage(apart * scale)


def _paste(
    canvas: torch.Tensor,
    items: list[_Item],
    coverage: torch.Tensor,
    grounds: torch.Tensor,
    half_patch: int,
) -> None:
    """Blend items [M] with coverage [M, P, P] into the padded canvas uint8 [N, Hp, Wp, 3]."""
    device = canvas.device
    flat = canvas.view(-1, 3)
    pixels = torch.arange(2 * half_patch, device=device)
    for slot in sorted({item.slot for item in items}):
        rows = [row for row, item in enumerate(items) if item.slot == slot]
        # The padding moves a centre by half a patch, a patch starts half a patch before it.
        corners = torch.tensor(
            [
                [items[r].scene, math.floor(items[r].center_y), math.floor(items[r].center_x)]
                for r in rows
            ]
        ).to(device)
        colors = torch.tensor([items[row].rgb for row in rows], dtype=torch.float32).to(device)
        lines = (corners[:, 0] * canvas.shape[1] + corners[:, 1])[:, None] + pixels
        columns = corners[:, 2, None] + pixels
        index = lines[:, :, None] * canvas.shape[2] + columns[:, None, :]
        alpha = coverage[torch.tensor(rows).to(device)][..., None]
        ground = grounds[corners[:, 0]].float()[:, None, None, :]
        blended = (ground + alpha * (colors[:, None, None, :] - ground)).round().to(torch.uint8)
        flat[index] = torch.where(alpha > 0, blended, flat[index])
