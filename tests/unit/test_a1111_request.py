"""AUTOMATIC1111's bodies become Kelvin's requests, or typed errors; nothing else."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import InvalidRequest, KelvinError
from serve.http.a1111_request import read_txt2img

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
NAMES = """prompt negative_prompt width height steps cfg_scale seed batch_size n_iter sampler_name
scheduler override_settings enable_hr styles eta alwayson_scripts send_images""".split()  # noqa: SIM905


def test_loras_leave_the_prompt():
    asked = read_txt2img({"prompt": "a <lora:bolt:0.8>cat <lora:ink> <lora:styles/oil:0.5:0.5>"})
    assert asked.request.prompt == "a cat  "
    assert [(lora.name, lora.weight) for lora in asked.request.loras] == [
        ("bolt", 0.8),
        ("ink", 1.0),
        ("styles/oil", 0.5),
    ]


@pytest.mark.parametrize("weight", [".5", " 0.5 ", "+5e-1", "0.5"])
def test_a_weight_is_a_decimal_number(weight: str):
    (lora,) = read_txt2img({"prompt": f"a <lora:ink:{weight}>"}).request.loras
    assert lora.weight == 0.5


@pytest.mark.parametrize("weight", ["much", "", "nan", "inf", "1_0", "٣", "0x1", "1e"])
def test_what_python_alone_takes_for_a_number_is_no_weight(weight: str):
    with pytest.raises(KelvinError) as caught:
        read_txt2img({"prompt": f"a <lora:ink:{weight}>"})
    assert caught.value.value == f"<lora:ink:{weight}>"


def test_a_weight_of_a_million_digits_is_read_once():
    # Taken in the square of its length it would keep the Pipeline from all else for hours.
    with pytest.raises(InvalidRequest) as caught:
        read_txt2img({"prompt": f"a <lora:ink:{'1' * 1_000_000}x>"})
    assert caught.value.field == "prompt"


def test_a_prompt_full_of_beginnings_of_tags_is_read_once():
    with pytest.raises(KelvinError):  # and not after a day, of a body of 3 MB
        read_txt2img({"prompt": "<a:" * 10**6})


def test_settings_of_a_request():
    settings = {"sd_model_checkpoint": "sd35.safetensors [0123abcdef]", "samples_format": "jpg"}
    asked = read_txt2img({"prompt": "a", "override_settings": settings, "seed": -1})
    assert asked.request.model == "sd35.safetensors"
    assert asked.request.output_format == "jpeg"
    assert asked.request.seed is None
    assert asked.warnings == ()
    asked = read_txt2img({"prompt": "a", "override_settings": {"eta_noise_seed_delta": 31337}})
    assert asked.warnings == (
        "Setting 'eta_noise_seed_delta' of override_settings is not known and was ignored.",
    )


@given(st.dictionaries(st.sampled_from(NAMES), JSON))
def test_any_json_is_read_or_refused_by_name(body):
    with contextlib.suppress(KelvinError):
        read_txt2img({"prompt": "a"} | body)
