"""Tensors survive the trip as numpy arrays, bit for bit."""

import numpy as np
import pytest
import torch

from deployments.sd3.wire import from_wire, to_wire


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(dtype):
    tensor = torch.randn(3, 7).to(dtype)
    tensor[0, 0] = float("nan")
    array = to_wire(tensor.t())
    assert array.dtype == (np.uint16 if dtype == torch.bfloat16 else np.float32)
    assert array.flags.c_contiguous
    array.flags.writeable = False
    back = from_wire(array, "cpu", dtype)
    assert back.dtype == dtype
    assert torch.equal(back.t().nan_to_num(7), tensor.nan_to_num(7))


def test_the_array_shares_no_memory_with_the_tensor():
    tensor = torch.zeros(4)
    array = to_wire(tensor)
    tensor += 1
    assert (array == 0).all()
    back = from_wire(array, "cpu", torch.float32)
    back += 1
    assert (array == 0).all()


def test_another_dtype_is_refused():
    with pytest.raises(TypeError):
        from_wire(np.zeros(3, np.float64), "cpu", torch.float32)  # type: ignore[arg-type]
