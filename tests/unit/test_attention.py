"""Every way to attend on a CPU is torch's attention, and rows do not feel their neighbours."""

import pytest
import torch
from torch.nn import functional as F

from deployments.sd3.attention import BACKENDS, Attention
from serve.errors import ConfigurationError

ON_CPU = ["flash", "math", "sdpa", "sdpa_in_float32"]


def drawn(
    *, query_tokens: int = 13, tokens: int = 13, width: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = torch.randn(3, 2, tokens, 4, width).unbind()
    return query[:, :query_tokens], key, value


@pytest.mark.parametrize("query_tokens", [13, 9], ids=["all", "image only"])
@pytest.mark.parametrize("name", ON_CPU)
def test_equals_torchs_attention(name, query_tokens):
    query, key, value = drawn(query_tokens=query_tokens)
    attended = BACKENDS[name](query, key, value)
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    expected = F.scaled_dot_product_attention(query, key, value)
    assert attended.shape == (2, query_tokens, 32)
    torch.testing.assert_close(attended, expected.transpose(1, 2).flatten(2))


# torch's kernel multiplies by AMX where the CPU has it, and packs what is large for that.
@pytest.mark.parametrize(("tokens", "width"), [(13, 8), (410, 64)], ids=["small", "256 x 256"])
@pytest.mark.parametrize("name", ON_CPU)
def test_a_row_does_not_feel_its_neighbour(name, tokens, width):
    inputs = drawn(query_tokens=tokens, tokens=tokens, width=width)
    query, key, value = (each.bfloat16() for each in inputs)
    alone = BACKENDS[name](query[:1], key[:1], value[:1])
    key[1] = float("nan")
    assert torch.equal(BACKENDS[name](query, key, value)[:1], alone)


@pytest.mark.parametrize(
    ("dtype", "amx", "expected"),
    [
        (torch.bfloat16, False, "sdpa_in_float32"),
        (torch.bfloat16, True, "sdpa"),
        (torch.float32, False, "sdpa"),
        (torch.float32, True, "sdpa"),
    ],
)
def test_a_cpu_takes_what_is_fastest_for_its_dtype(monkeypatch, dtype, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    attention = Attention("auto", torch.device("cpu"), dtype)
    attention.measure(2, 13, 4, 8)
    assert attention.backend(2, 13) == expected


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(ConfigurationError, match="'fast'") as refused:
        Attention("fast", torch.device("cpu"), torch.float32)
    assert refused.value.field == "attention"
    assert "cudnn" in str(refused.value.allowed)
