"""What FP8 products on a card rely on, and no CPU would notice if it were otherwise."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deployments.sd3.fp8 import Fp8Arithmetic, Fp8Linear
from deployments.sd3.modulation import Modulation
from deployments.sd3.stream_layout import StreamLayout

SOME = st.integers(1, 300)


@given(batch=st.integers(1, 9), image=SOME, text=SOME)
def test_row_scales_of_the_text_begin_at_a_multiple_of_16_bytes(batch, image, text):
    layout = StreamLayout(batch, image, text)
    assert layout.text_rows.start * torch.float32.itemsize % 16 == 0
    assert layout.image_rows == slice(0, batch * image)
    assert layout.image_rows.stop <= layout.text_rows.start < layout.image_rows.stop + 16
    assert layout.text_rows.stop - layout.text_rows.start == batch * text
    assert layout.text_rows.stop == layout.rows


@given(batch=st.integers(1, 9), image=SOME)
def test_an_image_alone_has_no_rows_of_nothing(batch, image):
    layout = StreamLayout(batch, image, 7).image_only
    assert layout.rows == layout.image_rows.stop == batch * image


def test_modulation_of_all_blocks_is_views_of_one_matrix():
    # 6 parts for the image and 2 for the text, as in SD3's last block: apart they would lie at
    # strides of their own, and the kernel knows one.
    def layers(arithmetic: Fp8Arithmetic | None) -> list[nn.Linear | Fp8Linear]:
        made = [nn.Linear(16, 6 * 16), nn.Linear(16, 2 * 16)]
        return [Fp8Linear.from_linear(each, arithmetic) if arithmetic else each for each in made]

    condition = torch.randn(3, 16)
    for arithmetic in (None, "dequantize", "scaled_mm"):
        given_layers = layers(arithmetic)
        with torch.inference_mode():
            expected = [layer(condition) for layer in given_layers]
            image, text = Modulation(given_layers, ["norm1", "norm1_context"], as_dtype=None)(
                condition
            )
        assert image.stride() == text.stride()
        assert image.untyped_storage().data_ptr() == text.untyped_storage().data_ptr()
        for one, other in zip((image, text), expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
