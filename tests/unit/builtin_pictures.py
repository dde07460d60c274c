"""Pictures for the checker's tests: drawn scenes, mildly spoiled copies, and false captions."""

import io
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from deployments.builtin.claims import WORD, Claims, ThingClaim
from deployments.builtin.vocabulary import (
    BACKGROUNDS,
    COLORS,
    OPPOSITE_RELATION,
    POSITIONS,
    SHAPES,
)
from deployments.builtin.world import Example, Kind, Scene, Split, draw, sample_example

Picture = npt.NDArray[np.uint8]

OPPOSITE_SIDE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


def pictures(scenes: list[Scene]) -> list[Picture]:
    """The scenes drawn, uint8 [height, width, 3] each."""
    return list(draw(scenes).permute(0, 2, 3, 1).contiguous().numpy())


def examples(
    kind: Kind, number: int, seed: int, height: int = 256, width: int = 256
) -> list[Example]:
    """Examples of one kind, of both splits by turns."""
    rng = random.Random(seed)
    splits: tuple[Split, Split] = ("train", "held_out")
    return [sample_example(rng, kind, splits[i % 2], height, width) for i in range(number)]


def blurred_and_noisy(picture: Picture) -> Picture:
    noise = np.random.default_rng(int(picture.sum())).normal(0, 4, picture.shape)
    soft = ndimage.gaussian_filter(picture.astype(np.float32), (1, 1, 0))
    spoiled: Picture = (soft + noise).round().clip(0, 255).astype(np.uint8)
    return spoiled


def jpeg(picture: Picture) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=75)
    return np.asarray(Image.open(buffer))


def wobbly(picture: Picture) -> Picture:
    """Outlines bent by some two pixels and softened, as by a hasty denoiser."""
    generator = np.random.default_rng(int(picture.sum()))
    height, width = picture.shape[:2]
    bends = [ndimage.gaussian_filter(generator.normal(size=(height, width)), 6) for _ in range(2)]
    rows, columns = np.mgrid[:height, :width]
    at = [rows + 1.8 * bends[0] / bends[0].std(), columns + 1.8 * bends[1] / bends[1].std()]
    planes = [
        ndimage.map_coordinates(picture[..., c].astype(np.float32), at, order=1, mode="nearest")
        for c in range(3)
    ]
    return np.stack(planes, -1).round().astype(np.uint8)


def _change_thing(
    claims: Claims, rng: random.Random, stated: str, change: Callable[[ThingClaim], ThingClaim]
) -> Claims | None:
    indices = [i for i, thing in enumerate(claims.things) if getattr(thing, stated) is not None]
    if stated == "shape":
        indices = [i for i in indices if claims.things[i].shape != WORD]
    if not indices:
        return None
    things = list(claims.things)
    index = rng.choice(indices)
    things[index] = change(things[index])
    return replace(claims, things=tuple(things))


def _false_position(thing: ThingClaim) -> ThingClaim:
    if thing.position == "center":
        return replace(thing, position=random.Random(str(thing)).choice(POSITIONS[5:]))
    words = (thing.position or "").split()
    return replace(thing, position=" ".join(OPPOSITE_SIDE[word] for word in words))


def _false_text(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text))
    sort = rng.random()
    if sort < 0.2 and len(text) < 4:
        return text + rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    if sort < 0.4 and len(text) > 2:
        return text[:at] + text[at + 1 :]
    others = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter != text[at]]
    return text[:at] + rng.choice(others) + text[at + 1 :]


def _false_count(claims: Claims, rng: random.Random) -> Claims | None:
    if not claims.exact:
        return None
    things = list(claims.things)
    countable = [i for i, thing in enumerate(things) if thing.shape != WORD]
    if not countable:
        return None
    index = rng.choice(countable)
    count = things[index].count or 1
    wrong = count + 1 if count == 1 or rng.random() < 0.5 else count - 1
    things[index] = replace(things[index], count=wrong)
    return replace(claims, things=tuple(things))


def falsify(example: Example, category: str, rng: random.Random) -> Claims | None:
    """The example's claims with one attribute made false; None if it states no such attribute."""
    claims, scene = example.claims, example.scene
    used_shapes = {thing.shape for thing in scene.things}
    used_colors = {thing.color for thing in scene.things}
    if scene.word is not None:
        used_colors.add(scene.word.color)
    shape = rng.choice([s for s in SHAPES if s not in used_shapes])
    color = rng.choice([c for c in COLORS if c not in used_colors])
    if category == "shape":
        return _change_thing(claims, rng, "shape", lambda t: replace(t, shape=shape))
    if category == "color":
        return _change_thing(claims, rng, "color", lambda t: replace(t, color=color))
    if category == "size":
        flipped = {"small": "large", "large": "small", None: None}
        if not claims.exact:
            return None
        return _change_thing(claims, rng, "size", lambda t: replace(t, size=flipped[t.size]))
    if category == "position":
        return _change_thing(claims, rng, "position", _false_position)
    if category == "word":
        return _change_thing(
            claims, rng, "text", lambda t: replace(t, text=_false_text(t.text or "", rng))
        )
    if category == "count":
        return _false_count(claims, rng)
    if category == "relation" and claims.relations:
        relations = list(claims.relations)
        index = rng.randrange(len(relations))
        turned = OPPOSITE_RELATION[relations[index].relation]
        relations[index] = replace(relations[index], relation=turned)
        return replace(claims, relations=tuple(relations))
    if category == "background" and claims.background is not None:
        others = [b for b in BACKGROUNDS if b != claims.background]
        return replace(claims, background=rng.choice(others))
    return None
