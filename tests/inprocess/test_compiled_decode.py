"""Compiled decoding is the same picture, for prepared sizes alone, and never stands in the way.

`aot_eager` is torch.compile without its code generator, which needs a C++ compiler on a CPU; what
the card runs is tested in tests/gpu.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from deployments.builtin.pico import write_pico
from deployments.sd3.compiled_decode import CompiledDecode
from deployments.sd3.vae import VaeDecoder
from deployments.vae_decoder import VaeDecoder as Stage
from serve.config import ModelSettings, PoolSettings


@pytest.fixture
def decoder(tmp_path: Path) -> VaeDecoder:
    return VaeDecoder.load(write_pico(tmp_path / "pico", seed=0), "cpu", "auto")


def latents(decoder: VaeDecoder, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height)
    given = torch.randn(1, decoder.channels, height, width, generator=generator)
    return given.to(decoder.precision.compute_dtype)


def test_prepared_sizes_are_compiled_others_are_not_and_pictures_are_the_same(decoder):
    plain = {
        size: decoder.decode(latents(decoder, *size)[0].float())
        for size in ((4, 6), (6, 4), (8, 8))
    }
    ran: list[tuple[int, ...]] = []

    def counted(graph: Any, inputs: Any) -> Any:
        code = compile_fx(graph, inputs)

        def run(*given: Any) -> Any:
            # Its parameters are inputs too; the picture's are the only ones with a batch of one.
            ran.extend(tuple(x.shape) for x in given if isinstance(x, torch.Tensor) and is_input(x))
            return code(*given)

        return run

    def is_input(x: torch.Tensor) -> bool:
        return x.dim() == 4 and x.shape[:2] == (1, decoder.channels)

    compile_fx = lookup_backend("aot_eager")
    decoder.compiled = CompiledDecode(decoder.model.decoder, backend=counted)
    for size in ((4, 6), (6, 4)):
        found = decoder.compiled.prepare(latents(decoder, *size), must_be_quicker=False)
        assert found.is_compiled, found.reason
        assert found.plain_ms is not None
        assert found.compiled_ms is not None
    assert decoder.prepared.keys() == {(1, 16, 4, 6), (1, 16, 6, 4)}
    ran.clear()
    for size, picture in plain.items():
        again = decoder.decode(latents(decoder, *size)[0].float())
        assert np.abs(again.astype(np.int16) - picture).max() <= 1
    assert ran == [(1, 16, 4, 6), (1, 16, 6, 4)]


def test_nothing_compiles_while_requests_wait(decoder):
    compiled = CompiledDecode(decoder.model.decoder, backend="aot_eager")
    compiled.prepare(latents(decoder, 4, 4), must_be_quicker=False)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.inference_mode():
        compiled(latents(decoder, 4, 4))
        compiled(latents(decoder, 4, 8))  # a mistake of the caller, and slower at worst
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def _broken(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler here\nand so on")


def _wrong(graph: Any, inputs: Any) -> Any:
    return lambda *given: tuple(result * 0.5 for result in graph(*given))


@pytest.mark.parametrize(("backend", "why"), [(_broken, "no compiler here"), (_wrong, "differs")])
def test_what_cannot_be_compiled_or_is_wrong_is_decoded_as_ever(decoder, backend, why):
    plain = decoder.decode(latents(decoder, 4, 4)[0].float())
    decoder.compiled = CompiledDecode(decoder.model.decoder, backend=backend)
    found = decoder.compiled.prepare(latents(decoder, 4, 4), must_be_quicker=False)
    assert not found.is_compiled
    assert why in found.reason
    assert "\n" not in found.reason
    assert np.array_equal(decoder.decode(latents(decoder, 4, 4)[0].float()), plain)


def test_on_a_cpu_nothing_is_compiled():
    stage = Stage(ModelSettings(path="pico"), PoolSettings(name="v", torch_threads=1))
    assert stage.status()["path"] == {}
    assert stage._decoder.prepare(4, 4) is None
