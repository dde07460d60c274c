"""The switches of the denoiser's fast path, one for each thing that makes it fast.

Every switch off gives the plain way of doing the same; `loadtest.denoise_bench --ablations` turns
them off one by one and says what each buys.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Optimizations:
    """What may differ from the plain forward; results differ by rounding only, INT8's included.

    On a CPU the kernels have no part: there `fused_qkv`, `fused_gelu`, `fp8_modulation`,
    `attention`, `int8_products` and `unpacked_weights` act.

    Attributes:
        fused_adaln: residual, LayerNorm, modulation and quantisation in one pass (`adaln.py`).
        fused_gelu: GELU and quantisation in one pass; on a CPU by a table, or for INT8 products
            without its form by tanh (`gelu.py`).
        fused_qkv: one product for query, key and value of a stream (`joint_attention.py`).
        fused_qk_norm: RMSNorm and the joint layout of attention in one pass (`joint_layout.py`).
        fused_quantize: what attention gives, quantised in one pass (`joint_layout.py`).
        fp8_modulation: modulation weights stay FP8, a third of all weights (`modulation.py`).
        int8_products: on a CPU where that is fast FP8 weights are made INT8 once (`int8.py`).
        unpacked_weights: on a CPU a small model's FP8 weights are dequantised once, not for each
            product (`unpacked_weights.py`); the same numbers.
        cuda_graphs: prepared buckets replay a captured graph (`cuda_graphs.py`).
        attention: `auto` measures what a card has; else a name that `attention.py` knows.
    """

    fused_adaln: bool = True
    fused_gelu: bool = True
    fused_qkv: bool = True
    fused_qk_norm: bool = True
    fused_quantize: bool = True
    fp8_modulation: bool = True
    int8_products: bool = True
    unpacked_weights: bool = True
    cuda_graphs: bool = True
    attention: str = "auto"
