"""A start image comes from a stranger: what is taken, what is refused, and what becomes of it."""

from __future__ import annotations

import base64
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from serve.errors import InvalidRequest
from serve.init_image import (
    LARGEST_PIXELS,
    fitted,
    pixels_of,
    sent_bytes,
    upright_size,
    with_own_size,
)
from serve.models import Defaults, ModelSpec
from serve.requests import GenerateRequest

MODEL = ModelSpec(
    name="m",
    licence="",
    defaults=Defaults(width=256, height=256),
    latent_channels=16,
    size_multiple=16,
    smallest_side=64,
    largest_width=512,
    largest_height=512,
    largest_area=512 * 256,
)


def picture(width: int = 48, height: int = 32, mode: str = "RGB", kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def seen(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is that large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def test_base64_and_data_uris_are_the_file():
    data = picture()
    text = base64.b64encode(data).decode()
    lines = "\n".join(text[at : at + 76] for at in range(0, len(text), 76))
    for sent in (text, lines, f"data:image/png;base64,{text}", f"DATA:;charset=x;base64,{text}"):
        assert sent_bytes(sent) == data


def test_a_data_uri_of_semicolons_takes_no_more_memory_than_it_has():
    tracemalloc.start()
    with pytest.raises(InvalidRequest):
        sent_bytes("data:" + ";" * (4 << 20))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 64 << 20


def test_base64_full_of_blanks_takes_no_more_memory_than_it_has():
    text = "QUJD \n" * (1 << 20)
    tracemalloc.start()
    data = sent_bytes(text)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert data == b"ABC" * (1 << 20)
    assert most < 4 * len(text)


@pytest.mark.parametrize(
    "sent",
    [
        "http://127.0.0.1/secret.png",
        "https://example.org/a.png",
        "file:///etc/passwd",
        "ftp:a",
        "data:image/png,%89PNG",
        "data:image/png;base64",
        "/etc/passwd?",
        "ä",
    ],
)
def test_whatever_else_is_refused_and_shown(sent: str):
    with pytest.raises(InvalidRequest) as caught:
        sent_bytes(sent)
    assert (caught.value.field, caught.value.value) == ("init_image", sent)
    assert "not fetched" in str(caught.value.allowed)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_of_the_right_size_keeps_its_pixels(kind: str):
    data = picture(kind=kind)
    assert np.array_equal(pixels_of(fitted(data, 48, 32)), seen(data))


def test_other_shapes_cover_and_are_cut_off_on_both_sides_alike():
    stripes = np.zeros((32, 96, 3), np.uint8)
    stripes[:, :16] = stripes[:, -16:] = 255
    buffer = io.BytesIO()
    Image.fromarray(stripes).save(buffer, "PNG")
    made = pixels_of(fitted(buffer.getvalue(), 64, 32))
    assert made.shape == (32, 64, 3)
    assert made.max() == 0


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "1", "I;16"])
def test_any_kind_of_pixels_becomes_rgb(mode: str):
    if mode == "I;16":
        buffer = io.BytesIO()
        Image.fromarray(np.full((32, 48), 0x7F00, np.uint16)).save(buffer, "PNG")
        assert (pixels_of(fitted(buffer.getvalue(), 48, 32)) == 0x7F).all()
        return
    made = pixels_of(fitted(picture(mode=mode), 48, 32))
    assert made.shape == (32, 48, 3)
    assert made.std() > 1


def test_a_picture_on_its_side_is_set_upright():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:, :24] = 255
    Image.fromarray(pixels).save(buffer, "JPEG", exif=exif)
    assert upright_size(buffer.getvalue()) == (32, 48)
    made = pixels_of(fitted(buffer.getvalue(), 32, 48))
    assert made[:20].min() > 200
    assert made[28:].max() < 50


def test_the_size_is_told_without_decoding_a_pixel():
    assert upright_size(claims(4000, 3000)) == (4000, 3000)


def test_nothing_of_the_file_but_its_pixels_is_kept():
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "somebody"
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture())).save(buffer, "PNG", exif=exif)
    assert b"somebody" in buffer.getvalue()
    assert b"somebody" not in fitted(buffer.getvalue(), 48, 32)


@pytest.mark.parametrize("size", [(LARGEST_PIXELS, 2), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int]):
    for call in (upright_size, lambda data: fitted(data, 64, 64)):
        with pytest.raises(InvalidRequest) as caught:
            call(claims(*size))
        assert caught.value.field == "init_image"


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF89a" + bytes(64), b"<svg/>", picture()[:-40], picture()[:50], claims(48, 32)],
    ids=["nothing", "gif", "svg", "cut short", "header only", "too few pixels"],
)
def test_what_is_no_whole_picture_is_refused(data: bytes):
    with pytest.raises(InvalidRequest) as caught:
        fitted(data, 48, 32)
    assert caught.value.field == "init_image"
    assert str(len(data)) in str(caught.value.value)


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ((100, 90), (96, 80)),
        ((256, 256), (256, 256)),
        ((20, 40), (64, 128)),
        ((4000, 3000), (416, 304)),
        ((3000, 300), (512, 48)),
    ],
)
def test_without_a_size_it_is_the_pictures_own_as_far_as_the_model_draws_it(size, drawn):
    request = with_own_size(GenerateRequest(prompt="a", init_image="b"), size, MODEL)
    assert (request.width, request.height) == drawn


def test_a_size_that_is_asked_for_stays():
    asked = GenerateRequest(prompt="a", init_image="b", height=128)
    assert with_own_size(asked, (64, 64), MODEL) == asked


def test_strength_has_a_default_and_is_of_no_use_alone():
    resolved = MODEL.resolve(GenerateRequest(prompt="a", init_image="b"))
    assert resolved.strength == 0.6
    assert MODEL.resolve(GenerateRequest(prompt="a")).strength is None
    for wrong in ({"strength": 0.5}, {"strength": 0.0, "init_image": "b"}, {"strength": 1.01}):
        with pytest.raises(InvalidRequest) as caught:
            GenerateRequest(prompt="a", **wrong)
        assert caught.value.field == "strength"
        assert "init_image" in str(caught.value.allowed)
