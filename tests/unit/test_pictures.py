"""Pictures carry their request, in every format, and files of strangers do no harm."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from serve.errors import InvalidRequest
from serve.pictures import encode_picture, prompts_fit, read_request
from serve.requests import LONGEST_PROMPT, GenerateRequest, OutputFormat

PIXELS = np.arange(32 * 48 * 3, dtype=np.uint32).astype(np.uint8).reshape(32, 48, 3)
FORMATS: list[OutputFormat] = ["png", "jpeg", "webp"]
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300).filter(str.strip)


@settings(max_examples=40)
@given(
    prompt=text,
    negative_prompt=text,
    output_format=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**64 - 1),
    guidance_scale=st.floats(0, 100),
)
def test_the_request_comes_back(seed: int, **fields: Any):
    request = GenerateRequest(**fields, seed=1, num_images=4, model="m", width=48, height=32)
    data = encode_picture(PIXELS, request, seed)
    alone = request.model_copy(update={"seed": seed, "num_images": 1})
    assert read_request(data) == alone


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_file_is_what_its_name_says(output_format: OutputFormat):
    request = GenerateRequest(prompt="a", output_format=output_format, quality=95)
    with Image.open(io.BytesIO(encode_picture(PIXELS, request, 1))) as picture:
        assert picture.format == output_format.upper()
        assert picture.size == (48, 32)
        if output_format == "png":
            np.testing.assert_array_equal(np.asarray(picture), PIXELS)


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_quality_decides_the_size(output_format: OutputFormat):
    sizes = [
        len(
            encode_picture(
                PIXELS, GenerateRequest(prompt="a", output_format=output_format, quality=quality), 1
            )
        )
        for quality in (5, 95)
    ]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("output_format", FORMATS)
def test_prompts_can_be_left_out(output_format: OutputFormat):
    request = GenerateRequest(
        prompt="secret-1",
        prompt_2="secret-2",
        prompt_3="secret-3",
        negative_prompt="secret-4",
        negative_prompt_2="secret-5",
        negative_prompt_3="secret-6",
        output_format=output_format,
        embed_prompt=False,
    )
    data = encode_picture(PIXELS, request, 5)
    assert b"secret" not in data
    with pytest.raises(InvalidRequest, match="without its prompt"):
        read_request(data)
    assert read_request(data, prompt="given").seed == 5
    assert read_request(data, prompt="given").prompt == "given"


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_longest_prompts_fit_or_are_left_out(output_format: OutputFormat):
    request = GenerateRequest(
        prompt="😀" * LONGEST_PROMPT,
        negative_prompt="é" * LONGEST_PROMPT,
        output_format=output_format,
    )
    data = encode_picture(PIXELS, request, 5)
    if prompts_fit(request):
        assert read_request(data).prompt == request.prompt
    else:
        assert output_format == "jpeg"
        assert read_request(data, prompt="x").seed == 5


def png_with(comment: bytes | str) -> bytes:
    info = PngImagePlugin.PngInfo()
    if isinstance(comment, str):
        info.add_itxt("kelvin", comment)
    else:
        info.add_text("kelvin", comment)
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


STRANGE = {
    "empty": b"",
    "text": b"hello",
    "only a signature": b"\x89PNG\r\n\x1a\n",
    "cut short": encode_picture(PIXELS, GenerateRequest(prompt="a"), 1)[:40],
    "no request inside": png_of_size(16, 16),
    "a bomb": png_of_size(2**31 - 1, 2**31 - 1),
    "no JSON": png_with("not json"),
    "deep JSON": png_with("[" * 100_000),
    "no object": png_with("[1, 2]"),
    "a wrong request": png_with(json.dumps({"prompt": "a", "width": 3})),
    "an unknown field": png_with(json.dumps({"prompt": "a", "evil": 1})),
    "NaN": png_with('{"prompt": "a", "guidance_scale": NaN}'),
    "another format": b"GIF89a" + bytes(20),
}


@pytest.mark.parametrize("data", STRANGE.values(), ids=STRANGE)
def test_what_is_not_ours_is_refused(data: bytes):
    with pytest.raises(InvalidRequest) as caught:
        read_request(data)
    assert caught.value.field == "from"
    assert caught.value.allowed


@pytest.mark.parametrize("output_format", FORMATS)
@settings(max_examples=60)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(output_format: OutputFormat, data: st.DataObject):
    whole = encode_picture(PIXELS, GenerateRequest(prompt="a", output_format=output_format), 1)
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        request = read_request(bytes(damaged))
    except InvalidRequest:
        return
    assert isinstance(request, GenerateRequest)


def test_files_are_read_by_path(tmp_path: Path):
    file = tmp_path / "picture.png"
    file.write_bytes(encode_picture(PIXELS, GenerateRequest(prompt="a"), 9))
    assert read_request(file).seed == 9
    for path in (tmp_path, tmp_path / "none.png"):
        with pytest.raises(InvalidRequest) as caught:
            read_request(path)
        assert caught.value.value == str(path)
