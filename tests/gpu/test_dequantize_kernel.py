"""The kernels for cards and torch releases that lack FP8 units or row-wise scales, bit by bit.

Compiling for sm_80 and sm_86 needs no such card, so what those cards would run is made here too.
"""

import pytest
import torch

from deployments.sd3.fp8 import dequantize

triton = pytest.importorskip("triton", reason="the kernels are Triton's")
from deployments.sd3.kernels.dequantize import dequantize_cuda, dequantize_kernel  # noqa: E402
from deployments.sd3.kernels.rescale import rescale_cuda_, rescale_kernel  # noqa: E402


def needs_gpu(test):
    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
    return pytest.mark.gpu(without(test))


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _codes(rows: int, columns: int) -> torch.Tensor:
    """Random finite codes of E4M3, on the host; all of them if there are enough columns."""
    finite = torch.arange(256, dtype=torch.uint8)
    finite = finite[(finite & 0x7F) != 0x7F]
    drawn = torch.randint(0, len(finite), (rows, columns), generator=torch.manual_seed(0))
    drawn[:, : len(finite)] = torch.arange(len(finite))[:columns]
    return finite[drawn].view(torch.float8_e4m3fn)


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 254), (9, 254), (64, 512), (33, 1037), (7, 2432), (2432, 9728)]
)
def test_every_finite_code_comes_out_bit_for_bit(shape, dtype):
    weight = _codes(*shape)
    # float16 ends at 65504 and begins to lose bits at 2**-14: it must agree there too.
    scale = torch.logspace(-9, 1, shape[0])
    expected = dequantize(weight, scale, dtype)
    found = dequantize_cuda(weight.cuda(), scale.cuda(), dtype)
    assert found.dtype == dtype
    assert torch.equal(_bits(found), _bits(expected))


@needs_gpu
def test_a_scratch_tensor_is_filled_and_nothing_beyond_it():
    weight, scale = _codes(5, 300), torch.rand(5)
    room = torch.full((7, 300), 3.0, device="cuda", dtype=torch.bfloat16)
    out = dequantize_cuda(weight.cuda(), scale.cuda(), torch.bfloat16, out=room[1:6])
    assert out.data_ptr() == room[1:6].data_ptr()
    assert torch.equal(out.cpu(), dequantize(weight, scale, torch.bfloat16))
    assert bool((room[[0, 6]] == 3).all())


@needs_gpu
def test_what_the_kernel_cannot_take_is_refused():
    weight, scale = _codes(4, 32).cuda(), torch.ones(4, device="cuda")
    for wrong in (
        (weight.float(), scale, torch.bfloat16),
        (weight.t(), scale, torch.bfloat16),
        (weight, scale[:3], torch.bfloat16),
        (weight, scale.double(), torch.bfloat16),
        (weight, scale, torch.bfloat16, torch.empty(4, 32, device="cuda")),
    ):
        with pytest.raises(ValueError, match="must be"):
            dequantize_cuda(*wrong)


@needs_gpu
@pytest.mark.parametrize("shape", [(1, 16), (666, 2432), (257, 1040)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_scales_and_bias_are_applied_and_rounded_once(shape, with_bias):
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", generator=generator)

    product = (random(*shape) * 1e6).bfloat16()
    # Scales as of a slice that begins anywhere: its address is no multiple of 16 bytes.
    row_scale = random(shape[0] + 1, 1).abs()[1:] * 1e-3
    channel_scale = random(shape[1]).abs() * 1e-3
    bias = random(shape[1]).bfloat16() if with_bias else None
    exact = product.double() * row_scale * channel_scale + (0 if bias is None else bias)
    found = rescale_cuda_(product, row_scale, channel_scale, bias)
    assert found.data_ptr() == product.data_ptr()
    # Half a unit in the last of bfloat16's 8 bits, and what roundings in float32 add.
    assert bool(((found.double() - exact).abs() <= exact.abs() * 2**-7.99 + 1e-6).all())


@needs_gpu
def test_nan_in_one_row_stays_there():
    product = torch.ones(6, 64, device="cuda", dtype=torch.bfloat16)
    scales = torch.ones(6, 1, device="cuda")
    scales[2] = float("nan")
    found = rescale_cuda_(product, scales, torch.ones(64, device="cuda"), None)
    assert bool(found[2].isnan().all())
    assert bool((found[[0, 1, 3, 4, 5]] == 1).all())


_DIVISIBLE = [["tt.divisibility", 16]]  # of addresses and widths: every Linear's are


@pytest.mark.parametrize("capability", [80, 86, 89, 90])
@pytest.mark.parametrize("out", ["*bf16", "*fp32"])
def test_dequantising_needs_no_fp8_instruction_and_reads_16_bytes_at_a_time(capability, out):
    types = {"codes": "*i8", "scales": "*fp32", "out": out, "rows": "i32", "columns": "i32"}
    sizes = {"ROWS": 8, "COLUMNS": 512}
    ptx = _compiled(dequantize_kernel, types, sizes, divisible=(0, 1, 2, 4), capability=capability)
    assert "e4m3" not in ptx
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx
    assert "mul.ftz" not in ptx  # subnormal results would be lost


@pytest.mark.parametrize("capability", [89, 90])
def test_rescaling_moves_16_bytes_at_a_time(capability):
    pointers = {"product": "*bf16", "row_scales": "*fp32", "channel_scales": "*fp32"}
    numbers = {"rows": "i32", "columns": "i32", "stride": "i32"}
    types = {**pointers, "bias": "*bf16", **numbers}
    sizes = {"HAS_BIAS": True, "ROWS": 4, "COLUMNS": 512}
    ptx = _compiled(rescale_kernel, types, sizes, divisible=(0, 2, 3, 5, 6), capability=capability)
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx


def _compiled(kernel, types, sizes, *, divisible, capability) -> str:
    """PTX of a kernel for a card that need not be here."""
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={**types, **dict.fromkeys(sizes, "constexpr")},
        constexprs=sizes,
        attrs={(index,): _DIVISIBLE for index in divisible},
    )
    compiled = triton.compile(
        source, target=triton.backends.compiler.GPUTarget("cuda", capability, 32)
    )
    return str(compiled.asm["ptx"])
