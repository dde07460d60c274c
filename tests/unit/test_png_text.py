"""Text chunks put into finished PNGs are read by Pillow, and nothing else of the file changes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from serve.pictures import encode_picture, read_request
from serve.png_text import with_png_text
from serve.requests import GenerateRequest

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
REQUEST = GenerateRequest(prompt="ein Käse, 奶酪", seed=3)
FILE = encode_picture(PIXELS, REQUEST, seed=3)
# NUL ends a text chunk's keyword, and lone surrogates are no text.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(prompt=TEXT, workflow=TEXT)
def test_pillow_reads_them_beside_the_request(prompt: str, workflow: str):
    data = with_png_text(FILE, {"prompt": prompt, "workflow": workflow})
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert (image.info["prompt"], image.info["workflow"]) == (prompt, workflow)
        assert np.array_equal(np.asarray(image), PIXELS)
    assert read_request(data) == read_request(FILE)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff\xe0", FILE[:10]])
def test_other_files_are_refused(data: bytes):
    with pytest.raises(ValueError, match="no PNG"):
        with_png_text(data, {"prompt": ""})
