"""What only a CPU with VNNI computes: elsewhere sums of INT8 products may overflow in 16 bits."""

import pytest
import torch

NEEDS_VNNI = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="this CPU has no VNNI for INT8 products"
)
