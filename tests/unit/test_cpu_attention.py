"""Attention as matrix products is torch's attention, and so is the processor around it."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch.nn import functional as F

from deployments.sd3 import cpu_attention
from deployments.sd3.cpu_attention import BmmJointAttention, bmm_attention


@pytest.mark.parametrize("most_scores", [1, 500, 1 << 30], ids=["row by row", "parts", "whole"])
def test_equals_torchs_attention(monkeypatch, most_scores):
    monkeypatch.setattr(cpu_attention, "_MOST_SCORES", most_scores)
    query, key, value = torch.randn(3, 2, 4, 13, 8).unbind()
    expected = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(bmm_attention(query, key, value), expected)


def test_a_row_does_not_feel_its_neighbour():
    query, key, value = torch.randn(3, 2, 4, 13, 8).bfloat16().unbind()
    alone = bmm_attention(query[:1], key[:1], value[:1])
    key[1] = float("nan")
    assert torch.equal(bmm_attention(query, key, value)[:1], alone)


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
@pytest.mark.parametrize("dual_attention_layers", [(), (0,)])
def test_the_processor_is_diffusers_own(qk_norm, dual_attention_layers):
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
        qk_norm=qk_norm,
        dual_attention_layers=dual_attention_layers,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, 16, 8, 6),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 24),
        "timestep": torch.tensor([900.0, 10.0]),
    }
    with torch.inference_mode():
        expected = model(**inputs).sample
        model.set_attn_processor(BmmJointAttention())
        ours = model(**inputs).sample
    torch.testing.assert_close(ours, expected)
