"""Pictures for the built-in model's card and the README.

    python -m loadtest.card_pictures

writes into the folder of the weights: `sheet_60.png`, a grid of fixed prompts with what was asked
under each picture; `sheet.png`, 24 of them for the README; and `sample.png`, the picture that
`kelvin demo` makes. Prompts and seeds were fixed before any picture was seen; what went wrong stays
in, under the checker's mark.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from deployments.builtin.sample_sheet import write_sheet
from deployments.builtin.world import check
from loadtest.picture_batches import PictureBatches, PictureSettings
from loadtest.trials import held_out_prompts
from serve.config import ModelSettings
from serve.model_dir import resolve_model_dir
from serve.models import ModelSpec

HERO = "a large red circle left of a small blue square"
HERO_SEED = 1  # as `kelvin demo` has it
_PROMPTS = 60
_CORE, _HARD = 16, 8  # of the small sheet
_COLUMNS = 6
_SHEET_SEED = 2
_SHOWN_PX = 200  # side of a picture in the sheet, so that the file stays small


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.card_pictures", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--out", type=Path, help="folder; that of the weights if absent")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model_dir = resolve_model_dir(ModelSettings(path="builtin"))
    out = options.out or model_dir
    settings = PictureSettings.of(ModelSpec.from_directory(model_dir))
    batches = PictureBatches(model_dir, options.precision, options.device, rows=1)

    (hero,) = batches.make([HERO], [""], [HERO_SEED], settings)
    _save_small(Image.fromarray(hero), out / "sample.png")

    drawn = held_out_prompts(_PROMPTS, _SHEET_SEED, settings.height, settings.width)
    prompts = [example.prompt for _, example in drawn]
    pictures = list(batches.make(prompts, [""] * len(prompts), range(len(prompts)), settings))
    captions = []
    for picture, (_, example) in zip(pictures, drawn, strict=True):
        verdict = check(picture, example.claims)
        wrong = [name for name, right in verdict.attributes.items() if not right]
        captions.append(example.prompt + (f" [wrong: {', '.join(wrong)}]" if wrong else ""))
    frames = [torch.tensor(_shrunk(picture)).permute(2, 0, 1) for picture in pictures]
    first = [index for index, (kind, _) in enumerate(drawn) if kind == "core"][:_CORE]
    first += [index for index, (kind, _) in enumerate(drawn) if kind == "hard"][:_HARD]
    for name, chosen in (("sheet_60.png", range(_PROMPTS)), ("sheet.png", first)):
        path = out / name
        write_sheet(path, [frames[i] for i in chosen], [captions[i] for i in chosen], _COLUMNS)
        with Image.open(path) as sheet:
            _save_small(sheet.convert("RGB"), path)


def _shrunk(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    side = (_SHOWN_PX, _SHOWN_PX)
    return np.asarray(Image.fromarray(picture).resize(side, Image.Resampling.LANCZOS))


def _save_small(picture: Image.Image, path: Path) -> None:
    # Median cut would spend its colours on backgrounds and mix red with purple.
    reduced = picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    reduced.save(path, optimize=True)


if __name__ == "__main__":
    main()
