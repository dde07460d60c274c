"""All shifts, scales and gates of a forward, from one product over one matrix.

Every block's modulation Linears read the same vector of a request, so they are one layer. It holds
a third of Large's parameters; FP8 buys 2.5 GiB and a millisecond a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deployments.sd3.fp8 import Fp8Linear
from deployments.sd3.linear import Linear, plain, stacked
from deployments.sd3.lora_layers import Adaptable, RowLoras, SideBranch
from deployments.sd3.stream_layout import StreamLayout


class Modulation(nn.Module):
    """The modulation Linears of all blocks.

    Args:
        layers: One for each stream of each block, in order; their weights are taken over.
        names: Theirs.
        as_dtype: What FP8 weights become; None keeps them.
    """

    def __init__(
        self, layers: Sequence[Linear], names: Sequence[str], *, as_dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.adaptable = Adaptable(
            (tuple(names),),
            layers[0].in_features,
            tuple(layer.out_features for layer in layers),
        )
        self.side: SideBranch | None = None
        self.sizes = [layer.out_features for layer in layers]
        if as_dtype is not None:
            layers = [plain(layer, as_dtype) for layer in layers]
        # Anything but products of a byte a weight reads more bytes, and stacking, or making one
        # weight of all anew for each product, would for a moment hold a third of the model twice.
        in_a_byte = all(
            isinstance(layer, Fp8Linear) and layer.arithmetic != "dequantize" for layer in layers
        )
        self.layers = nn.ModuleList([stacked(layers)] if in_a_byte else layers)

    def forward(self, condition: Tensor, loras: RowLoras | None = None) -> list[Tensor]:
        """Return one [B, size] for each layer given, all views of one matrix.

        Args:
            condition: [B, D], after SiLU.
            loras: What adapts the rows of the batch.
        """
        outputs = [layer(condition) for layer in self.layers]
        whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        if loras is not None and self.side is not None:
            self.side.add_(whole, condition, StreamLayout(len(condition), 1, 0), loras)
        return list(whole.split(self.sizes, dim=1))
