"""A picture of pictures: a grid with each prompt under its picture, for people to look at."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

_CAPTION_LINES = 4
_LINE_PX = 13
_GAP_PX = 6


def write_sheet(
    path: Path, frames: Sequence[torch.Tensor], captions: Sequence[str], columns: int
) -> None:
    """Write a PNG grid.

    Args:
        path: of the PNG.
        frames: uint8 [3, height, width] each, all of one size.
        captions: one for each frame, wrapped to its width.
        columns: pictures in a row.

    Raises:
        ValueError: no frames, or another number of captions.
    """
    if not frames or len(frames) != len(captions):
        raise ValueError("a sheet needs frames and one caption for each")
    height, width = frames[0].shape[-2:]
    cell_down = height + _CAPTION_LINES * _LINE_PX + _GAP_PX
    cell_right = width + _GAP_PX
    rows = -(-len(frames) // columns)
    sheet = Image.new("RGB", (columns * cell_right, rows * cell_down), "white")
    drawing = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    letters = max(8, round(width / 5.6))
    for index, (frame, caption) in enumerate(zip(frames, captions, strict=True)):
        left, top = index % columns * cell_right, index // columns * cell_down
        sheet.paste(Image.fromarray(frame.cpu().permute(1, 2, 0).numpy()), (left, top))
        lines = textwrap.wrap(caption, letters)[:_CAPTION_LINES]
        drawing.text((left + 2, top + height + 1), "\n".join(lines), fill="black", font=font)
    sheet.save(path)
