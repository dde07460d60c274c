"""Peers on a CPU compute in what is the faster there, which their folder is stored in."""

from pathlib import Path

import pytest
import torch

from deployments.builtin.dequantise import dequantized_directory
from deployments.builtin.pico import write_pico
from loadtest.peer_dtype import faster_of, product_ms, stored_dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_is_loaded_as_it_is_stored(tmp_path: Path, dtype: torch.dtype):
    folder = dequantized_directory(write_pico(tmp_path / "fp8"), tmp_path / "plain", dtype)
    assert stored_dtype(folder) == dtype


def test_both_are_measured_and_the_faster_is_taken():
    threads = torch.get_num_threads()
    took = product_ms()
    assert took.keys() == {torch.bfloat16, torch.float32}
    assert min(took.values()) > 0
    assert torch.get_num_threads() == threads
    for slow, fast in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        assert faster_of({slow: 2.0, fast: 1.0}) == fast
