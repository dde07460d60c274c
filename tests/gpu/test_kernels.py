"""Each kernel of the denoiser beside the plain way of doing the same, at widths that SD3.5 has."""

import pytest
import torch

from deployments.sd3.adaln import modulate
from deployments.sd3.fp8 import QuantizedRows
from deployments.sd3.gelu import gelu
from deployments.sd3.joint_layout import from_joint, to_joint
from deployments.sd3.linear import Quantization
from deployments.sd3.mmdit import Mmdit
from deployments.sd3.optimizations import Optimizations
from deployments.sd3.precision import PrecisionChoice
from deployments.sd3.stream_layout import PerStream, StreamLayout
from loadtest.sd35 import config, random_inputs, random_transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DEQUANTIZED = PrecisionChoice("fp8", "fp8", torch.bfloat16, "as on a card without FP8 units")
BF16 = PrecisionChoice("bf16", "bf16", torch.bfloat16, "for this test")
PLAIN = Optimizations(
    fused_adaln=False,
    fused_gelu=False,
    fused_qkv=False,
    fused_qk_norm=False,
    fused_quantize=False,
    cuda_graphs=False,
    attention="efficient",
)
LAYOUTS = [StreamLayout(2, 100, 33), StreamLayout(3, 7, 5), StreamLayout(1, 64, 0)]
ROUNDING = 4e-3  # of bfloat16, once more than the plain way or once less
ONE_CODE = 0.03  # a value between two E4M3 codes may go to either: 1/16 apart, seldom
WAYS = ["dynamic", "static", "saturating"]


def way(name: str, layout: StreamLayout) -> Quantization:
    """Ways to quantise numbers of order 1; the streams differ."""
    if name == "dynamic":
        return Quantization()
    image, text = torch.tensor({"static": [6.0, 5.0], "saturating": [0.5, 0.1]}[name]).cuda() / 448
    return Quantization(PerStream(image, text if layout.text else None))


def same_scales(ours, plain, layout: StreamLayout, quantize: str | None) -> bool:
    """True if constants are what was asked for; a row's own differs by rounding."""
    if quantize in (None, "dynamic"):
        return True
    rows = [layout.image_rows, layout.text_rows]
    return all(torch.equal(ours.scale[at], plain.scale[at]) for at in rows)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def values(x: torch.Tensor | QuantizedRows) -> torch.Tensor:
    return x.values.float() * x.scale if isinstance(x, QuantizedRows) else x.float()


def relative(ours, reference, layout: StreamLayout | None = None) -> float:
    ours, reference = values(ours), values(reference)
    if layout:  # what lies between the streams is nothing
        tokens = [*range(layout.rows)[layout.image_rows], *range(layout.rows)[layout.text_rows]]
        ours, reference = ours[tokens], reference[tokens]
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("width", [320, 1536, 2432])
@pytest.mark.parametrize("quantize", [None, *WAYS])
@pytest.mark.parametrize("with_branch", [False, True])
def test_adaln(layout, width, quantize, with_branch):
    parts = drawn(layout.batch, 6 * width).chunk(6, dim=1)  # views, as the model has them
    shift, scale, gate = (
        PerStream(parts[index], parts[index + 3] if layout.text else None) for index in range(3)
    )
    hidden = drawn(layout.rows, width)
    branch = drawn(layout.rows, width) if with_branch else None
    states, results = [hidden.clone(), hidden.clone()], []
    for state, fused in zip(states, (True, False), strict=True):
        results.append(
            modulate(
                state,
                layout,
                shift,
                scale,
                branch=branch,
                gate=gate if with_branch else None,
                quantize=way(quantize, layout) if quantize else False,
                fused=fused,
            )
        )
    assert same_scales(results[0], results[1], layout, quantize)
    assert relative(results[0], results[1], layout) < (ONE_CODE if quantize else ROUNDING)
    assert relative(states[0], states[1], layout) < ROUNDING


@pytest.mark.parametrize("quantize", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("columns", [1280, 6144, 9728])
def test_gelu(columns, layout, quantize):
    x = drawn(layout.rows, columns)
    x[3] = 0
    how = way(quantize, layout)
    ours, plain = (gelu(x, layout, quantize=how, fused=fused) for fused in (True, False))
    assert same_scales(ours, plain, layout, quantize)
    assert relative(ours, plain, layout) < ONE_CODE
    assert not values(ours)[3].any()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("heads", [5, 24, 38])
def test_to_joint(layout, heads):
    query, key, value = drawn(layout.rows, 3 * heads * 64).chunk(3, dim=1)
    norms = [PerStream(drawn(64), drawn(64) if layout.text else None) for _ in range(2)]
    ours, plain = (
        to_joint((query, key, value), layout, heads, *norms, fused=fused) for fused in (True, False)
    )
    for one, other in zip(ours, plain, strict=True):
        assert one.shape == other.shape == (layout.batch, layout.tokens, heads, 64)
        assert relative(one, other) < ROUNDING


@pytest.mark.parametrize("quantize", WAYS)
@pytest.mark.parametrize("image_only", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("width", [320, 2432])
def test_from_joint(layout, width, image_only, quantize):
    attended = drawn(layout.batch, layout.tokens, width)
    left = layout.image_only if image_only else layout
    how = way(quantize, left)
    ours, plain = (from_joint(attended, left, quantize=how, fused=fused) for fused in (True, False))
    assert same_scales(ours, plain, left, quantize)
    assert relative(ours, plain, left) < ONE_CODE


@pytest.mark.parametrize("quantize", WAYS)
def test_a_row_of_nonsense_stays_alone(quantize):
    layout = StreamLayout(1, 5, 0)
    how = way(quantize, layout)
    x = drawn(5, 6144)
    expected = gelu(x, layout, quantize=how, fused=True)
    x[2] = float("nan")
    found = gelu(x, layout, quantize=how, fused=True)
    assert torch.equal(values(found)[[0, 1, 3, 4]], values(expected)[[0, 1, 3, 4]])
    assert values(found)[2].isnan().any()


@pytest.mark.parametrize("precision", [DEQUANTIZED, BF16], ids=lambda each: each.label)
@pytest.mark.parametrize("name", ["tiny", "tiny-dual"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_whole_forward_is_the_plain_one(name, rows, precision):
    inputs = random_inputs(config(name), rows, 24, 20, "cuda")
    velocities = []
    for optimizations in (Optimizations(attention="efficient"), PLAIN):
        model = random_transformer(name, "cuda", torch.bfloat16)
        mmdit = Mmdit.from_diffusers(model, "cuda", precision, optimizations)
        velocities.append(
            mmdit.velocity(inputs.latents, inputs.sigmas, inputs.prompt_embeds, inputs.pooled)
        )
    for ours, plain in zip(*velocities, strict=True):  # row by row: one may hide in the mean
        assert relative(ours, plain) < 0.02


def test_modulation_of_two_matrices_is_refused():
    layout = StreamLayout(2, 16, 4)
    parts = PerStream(drawn(2, 64), drawn(2, 6 * 64)[:, :64])
    with pytest.raises(ValueError, match="one matrix"):
        modulate(drawn(layout.rows, 64), layout, parts, parts, quantize=False, fused=True)
