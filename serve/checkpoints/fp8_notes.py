"""What files say of their own quantisation, in each of the forms in use, as one form.

- Plain cast: FP8 weights and nothing else.
- Older: a marker `scaled_fp8` (two elements: multiply in full precision), `X.scale_weight` and
  sometimes `X.scale_input`.
- Newer: `X.weight_scale`, sometimes `X.input_scale`, and what to do with layer X as JSON, either in
  the tensor `X.comfy_quant` or for all layers in the metadata `_quantization_metadata`.
- Kelvin's own: `X.weight_scale` with a value a row.

Sources: ComfyUI's QUANTIZATION.md and `convert_old_quants`. Where a layer has no input scale
ComfyUI divides its input by 1; here it is quantised by each row's own largest value, which loses
less. An input scale that is there is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.checkpoints.header import StoredTensor
from serve.checkpoints.tensor_files import TensorFiles
from serve.errors import ConfigurationError

MARKER = "scaled_fp8"
NOTE = "comfy_quant"
_METADATA = "_quantization_metadata"
_LEAVES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_READABLE = "FP8 weights in float8_e4m3fn or float8_e5m2, with one scale a tensor or a row"


@dataclass(frozen=True)
class Fp8Notes:
    """One form for all.

    Attributes:
        name: Of the form, for people.
        full_precision: Modules whose products are made in ordinary precision.
        read_as: Module -> dtype of its weight where that is stored as bytes.
    """

    name: str
    full_precision: frozenset[str]
    read_as: Mapping[str, str]


def leaf_of(leaf: str) -> str:
    """Return today's name of a tensor's last part: `weight_scale` for `scale_weight`."""
    return _LEAVES.get(leaf, leaf)


def read_notes(files: TensorFiles, tensors: Mapping[str, StoredTensor], prefix: str) -> Fp8Notes:
    """Read what a part's files say.

    Args:
        files: Of the part.
        tensors: The part's own, prefix removed.
        prefix: What was removed.

    Raises:
        ConfigurationError: A quantisation that Kelvin does not read, by its name.
    """
    _refuse_others(files, tensors)
    stated: dict[str, Any] = {}
    text = files.metadata(_METADATA)
    if text is not None:
        layers = _json(text, files, _METADATA).get("layers")
        if not isinstance(layers, dict):
            raise _refusal(files, f"has {_METADATA} without layers")
        stated |= {str(name).removeprefix(prefix): note for name, note in layers.items()}
    for name in tensors:
        if name.endswith("." + NOTE):
            raw = files.read_small(prefix + name)
            stated[name.removesuffix("." + NOTE)] = _json(raw, files, name)
    stated = {name: note for name, note in stated.items() if f"{name}.weight" in tensors}
    full, read_as = set(), {}
    for module, note in stated.items():
        form = note.get("format") if isinstance(note, dict) else note
        if not isinstance(form, str) or form not in _FORMATS:
            raise _refusal(files, f"holds layer {module!r} quantised as {str(form)[:60]!r}")
        if isinstance(note, dict) and note.get("full_precision_matrix_mult"):
            full.add(module)
        if tensors[f"{module}.weight"].dtype == "U8":
            read_as[module] = _FORMATS[form]
    name = _name(tensors, bool(stated))
    if MARKER in tensors and tensors[MARKER].elements == 2:
        full |= {n.removesuffix(".scale_weight") for n in tensors if n.endswith(".scale_weight")}
    return Fp8Notes(name, frozenset(full), read_as)


def _name(tensors: Mapping[str, StoredTensor], has_notes: bool) -> str:
    if not any(tensor.dtype.startswith("F8_E") for tensor in tensors.values()) and not has_notes:
        return "not quantised"
    if has_notes:
        return "scaled FP8"
    if MARKER in tensors or any(name.endswith(".scale_weight") for name in tensors):
        return "scaled FP8, older keys"
    scales = [t for name, t in tensors.items() if name.endswith(".weight_scale")]
    if not scales:
        return "FP8 by plain cast"
    return "scaled FP8 by channel" if any(t.elements > 1 for t in scales) else "scaled FP8"


def _refuse_others(files: TensorFiles, tensors: Mapping[str, StoredTensor]) -> None:
    for name, tensor in tensors.items():
        if name.endswith(("_weight_qdata", "_weight_scale")) and "." in name:
            leaf = name.rpartition(".")[2]
            if leaf in ("_weight_qdata", "_weight_scale"):
                raise _refusal(files, f"is a torchao file (tensor {name!r})")
        if "_quantizer." in name or name.endswith("._amax"):
            raise _refusal(files, f"is a ModelOpt file (tensor {name!r})")
        if name.endswith((".absmax", ".quant_map")) or ".quant_state." in name:
            raise _refusal(files, f"is a bitsandbytes file (tensor {name!r})")
        if name.endswith(".weight_scale_2") or tensor.dtype in ("F4", "F6_E2M3", "F6_E3M2"):
            raise _refusal(files, f"holds 4 or 6 bit weights (tensor {name!r})")
    if files.metadata("tensor_names") is not None:
        raise _refusal(files, "is a torchao file (metadata 'tensor_names')")


def _json(text: str | bytes, files: TensorFiles, where: str) -> dict[str, Any]:
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refusal(files, f"has {where!r} that is no JSON: {str(error)[:100]}") from None
    if not isinstance(loaded, dict):
        raise _refusal(files, f"has {where!r} that is no JSON object")
    return loaded


def _refusal(files: TensorFiles, what: str) -> ConfigurationError:
    path = str(files.paths[0])
    return ConfigurationError(f"{path} {what}.", field="model.path", value=path, allowed=_READABLE)
