"""LoRAs of the text encoders: branches beside their Linear layers while some prompts are encoded.

Prompts with other LoRAs are encoded apart, so a branch is the same for every row, and hooks put it
there and take it away. What was read stays on the device as long as there is room for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deployments.payloads import LoraUse
from deployments.sd3.lora_arena import LowRank
from deployments.sd3.lora_tensors import read_layers
from serve.checkpoints.key_names import Kind
from serve.checkpoints.lora_file import LoraFile

_MOST_BYTES = 512 << 20

_Layers = dict[Kind, dict[str, LowRank]]


class TextLoras:
    """Puts LoRAs beside text encoders. From one thread.

    Args:
        models: The encoders that are loaded.
        find: Returns the file of a name.
        device: Of the encoders.
        dtype: That they compute in.
    """

    def __init__(
        self,
        models: Mapping[Kind, nn.Module],
        find: Callable[[str], LoraFile],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._models = models
        self._find = find
        self._device = device
        self._dtype = dtype
        self._kept: OrderedDict[tuple[str, str], _Layers] = OrderedDict()
        self.bytes = 0

    @contextmanager
    def beside(self, uses: Sequence[LoraUse]) -> Iterator[None]:
        """Have the encoders adapted within.

        Raises:
            KelvinError: A file cannot be used.
        """
        with ExitStack() as hooks:
            for use in uses:
                for part, layers in self._layers(use).items():
                    for name, layer in layers.items():
                        module = self._models[part].get_submodule(name)
                        handle = module.register_forward_hook(_branch(layer, use.weight))
                        hooks.callback(handle.remove)
            yield

    def _layers(self, use: LoraUse) -> _Layers:
        key = (use.name, use.version)
        if key not in self._kept:
            file = self._find(use.name)
            found: _Layers = {}
            for part in self._models:
                found[part] = {
                    name: LowRank(
                        layer.down.to(self._device, self._dtype),
                        layer.up.to(self._device, self._dtype),
                    )
                    for name, layer in read_layers(file, file.of(part)).items()
                }
            self._kept[key] = found
            self.bytes += _bytes(found)
            while self.bytes > _MOST_BYTES and len(self._kept) > 1:
                self.bytes -= _bytes(self._kept.popitem(last=False)[1])
        self._kept.move_to_end(key)
        return self._kept[key]


def _branch(layer: LowRank, weight: float) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        x: Tensor = inputs[0]
        hidden = F.linear(x, layer.down.to(x.dtype)) * weight
        return output + F.linear(hidden, layer.up.to(x.dtype)).to(output.dtype)

    return hook


def _bytes(layers: _Layers) -> int:
    return sum(
        each.down.nbytes + each.up.nbytes for part in layers.values() for each in part.values()
    )
