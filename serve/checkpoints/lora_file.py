"""What a LoRA file adapts, and by how much: told by its header and its alphas, before its data.

Everything is checked here that can be without reading a matrix: that each has its pair, that shapes
are those of the model at hand, that ranks agree and are bounded, and that the file is a LoRA at all
and not one of its relatives.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.checkpoints.architecture import expected_shapes
from serve.checkpoints.checks import listed
from serve.checkpoints.header import Header, StoredTensor, read_header
from serve.checkpoints.key_names import DIFFUSERS, Kind, Target
from serve.checkpoints.lora_names import Places, Role, other_kind, part_of, role_of, stranger_of
from serve.checkpoints.tensor_files import read_json
from serve.errors import ConfigurationError, InvalidRequest

MOST_RANKS = 256
READABLE = ("F32", "F16", "BF16")
METADATA_KEY = "lora_adapter_metadata"  # diffusers' LORA_ADAPTER_METADATA_KEY

_LARGEST_SCALE = 1e4
_LARGEST_ALPHA = _LARGEST_SCALE * MOST_RANKS
_MATRICES: tuple[Role, ...] = ("down", "up")
_WIDTHS = {2432: "Stable Diffusion 3.5 Large", 1536: "Stable Diffusion 3.5 Medium"}
_ALLOWED = "the name of a .safetensors LoRA for this model"


@dataclass(frozen=True)
class LoraLayer:
    """One layer's matrices: W + scale * up @ down.

    Attributes:
        part: Of the model.
        module: By diffusers' and transformers' names.
        down: Tensor [rank, in].
        up: Tensor whose rows, or some of them, are [out, rank].
        rows: Which of them: (i, n) is the i-th of n equal parts.
        swapped: The halves of those rows change places.
        rank: Of both.
        scale: alpha / rank.
    """

    part: Kind
    module: str
    down: str
    up: str
    rows: tuple[int, int]
    swapped: bool
    rank: int
    scale: float


@dataclass(frozen=True)
class LoraFile:
    """A file that was checked against a model."""

    name: str
    header: Header
    layers: tuple[LoraLayer, ...]

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.header.path

    def of(self, *parts: Kind) -> tuple[LoraLayer, ...]:
        """Return the layers of some parts."""
        return tuple(layer for layer in self.layers if layer.part in parts)

    def rank(self, *parts: Kind) -> int:
        """Return the largest rank in some parts; 0 where it adapts nothing there."""
        return max((layer.rank for layer in self.of(*parts)), default=0)


class BaseModel:
    """The layers that LoRAs of one model may adapt.

    Args:
        configs: `config.json` of each part that the model has.
        only: Of which parts layers are read; what a file says of others is not looked at. None: of
            all of them.
    """

    def __init__(
        self, configs: Mapping[Kind, Mapping[str, Any]], only: Collection[Kind] | None = None
    ) -> None:
        self.only = only
        self.shapes: dict[Kind, dict[str, tuple[int, ...]]] = {}
        for part, config in configs.items():
            self.shapes[part] = {
                name.removesuffix(".weight"): shape
                for name, shape in expected_shapes(part, config).items()
                if name.endswith(".weight") and len(shape) == 2
            }
        self.width = self.shapes["transformer"]["proj_out"][1]
        self.places = Places(self.shapes)

    @classmethod
    def of_folder(cls, folder: Path, only: Collection[Kind] | None = None) -> BaseModel:
        """Read the configurations of a folder in Diffusers layout.

        Args:
            folder: Of the model.
            only: See above.

        Raises:
            ConfigurationError: One is broken.
        """
        paths = {
            part: folder / name / "config.json" for part, name in DIFFUSERS.items() if part != "vae"
        }
        return cls({part: read_json(path) for part, path in paths.items() if path.is_file()}, only)


def read_lora(path: Path, name: str, base: BaseModel) -> LoraFile:
    """Read a file's header and alphas.

    Args:
        path: Of the file.
        name: By which it was asked for; errors name it, not where it lies.
        base: The model that it shall adapt.

    Raises:
        InvalidRequest: It is damaged, no LoRA, or a LoRA for something else; names file, tensor
            and what was expected.
    """
    try:
        header = read_header(path)
    except ConfigurationError as error:
        raise refusal(name, error.message.replace(str(path), "the file").rstrip(".")) from None
    return _Reader(name, header, base).read()


def refusal(name: str, what: str, allowed: str = _ALLOWED) -> InvalidRequest:
    """Return the error for a file that cannot be used."""
    return InvalidRequest(f"LoRA {name!r}: {what}.", field="loras", value=name, allowed=allowed)


class _Reader:
    def __init__(self, name: str, header: Header, base: BaseModel) -> None:
        self.name = name
        self.header = header
        self.base = base
        self.adapters: dict[str, dict[Role, str]] = {}
        self.stated: dict[str, Any] = {}  # by the file's metadata

    def read(self) -> LoraFile:
        tensors = self.header.tensors
        if not tensors:
            raise refusal(self.name, "it is empty")
        if found := other_kind(tensors):
            raise refusal(self.name, f"tensor {found[0]!r} is of {found[1]}, and only LoRA is read")
        strange = []
        for name in tensors:
            role = role_of(name)
            if role is None:
                strange.append(name)
            else:
                roles = self.adapters.setdefault(role[0], {})
                if role[1] in roles:
                    raise refusal(self.name, f"tensor {name!r} is there in two spellings")
                roles[role[1]] = name
        if other := stranger_of(tensors):
            raise refusal(self.name, f"it is for {other[1]}, as tensor {other[0]!r} shows")
        if strange:
            raise refusal(self.name, f"it holds {listed(sorted(strange))} that no LoRA has")
        alphas, self.stated = self._alphas(), self._metadata()
        layers = [
            layer
            for module, roles in self.adapters.items()
            for layer in self._of(module, roles, alphas)
        ]
        self._check_once(layers)
        return LoraFile(self.name, self.header, tuple(layers))

    def _of(
        self, module: str, roles: Mapping[Role, str], alphas: Mapping[str, float]
    ) -> list[LoraLayer]:
        if self.base.only is not None and (part_of(module) or "transformer") not in self.base.only:
            return []
        for role in _MATRICES:
            if role not in roles:
                own = next(iter(roles.values()))
                raise refusal(self.name, f"tensor {own!r} lacks its {role} matrix")
        place = self.base.places.of(module)
        if place is None:
            raise self._misplaced(module, roles["down"])
        down, up = (self._matrix(roles[role]) for role in _MATRICES)
        rank = down.shape[0]
        if up.shape[1] != rank or not 1 <= rank <= MOST_RANKS:
            raise refusal(
                self.name,
                f"tensors {roles['down']!r} {list(down.shape)} and {roles['up']!r}"
                f" {list(up.shape)} have no rank in common that is from 1 to {MOST_RANKS}",
            )
        scale = self._scale(module, place.part, rank, alphas)
        return [
            self._layer(place.part, target, roles, down.shape, up.shape, rank, scale)
            for target in place.targets
        ]

    def _layer(
        self,
        part: Kind,
        target: Target,
        roles: Mapping[Role, str],
        down: tuple[int, ...],
        up: tuple[int, ...],
        rank: int,
        scale: float,
    ) -> LoraLayer:
        columns, inputs = self.base.shapes[part][target.module]
        at, parts = target.part or (0, 1)
        for name, found, expected in (
            (roles["down"], down, (rank, inputs)),
            (roles["up"], up, (columns * parts, rank)),
        ):
            if found != expected:
                raise self._misfit(part, name, found, expected)
        if part == "transformer" and not target.module.startswith("transformer_blocks."):
            raise refusal(
                self.name,
                f"tensor {roles['down']!r} adapts {target.module!r}; only layers of the blocks are",
            )
        return LoraLayer(
            part,
            target.module,
            roles["down"],
            roles["up"],
            (at, parts),
            target.swapped,
            rank,
            scale,
        )

    def _matrix(self, name: str) -> StoredTensor:
        tensor = self.header.tensors[name]
        shape = tensor.shape
        if len(shape) == 4 and shape[2:] == (1, 1):  # some tools store Linear layers so
            shape = shape[:2]
        if len(shape) != 2 or not all(shape):
            raise refusal(
                self.name, f"tensor {name!r} is {list(tensor.shape)}; a matrix was expected"
            )
        if tensor.dtype not in READABLE:
            expected = ", ".join(READABLE)
            raise refusal(
                self.name, f"tensor {name!r} has dtype {tensor.dtype}; expected one of {expected}"
            )
        return StoredTensor(tensor.dtype, shape, tensor.begin, tensor.end)

    def _misplaced(self, module: str, name: str) -> InvalidRequest:
        part = part_of(module)
        if part is not None and part not in self.base.shapes:
            return refusal(self.name, f"tensor {name!r} adapts {part}, which this model is without")
        blocks = {key.split(".")[1] for key in self.base.shapes["transformer"] if "_blocks." in key}
        return refusal(
            self.name,
            f"tensor {name!r} adapts no layer of this model, which has {len(blocks)} blocks of"
            f" width {self.base.width}",
        )

    def _misfit(
        self, part: Kind, name: str, found: tuple[int, ...], expected: tuple[int, ...]
    ) -> InvalidRequest:
        words = f"tensor {name!r} is {list(found)}; {list(expected)} was expected"
        if part == "transformer":
            own = self.base.width
            for width, model in _WIDTHS.items():
                if width != own and any(side % width == 0 for side in found):
                    words += f": it seems to be for {model} (width {width}), this model's is {own}"
        return refusal(self.name, words)

    def _check_once(self, layers: list[LoraLayer]) -> None:
        seen: dict[tuple[Kind, str], str] = {}
        for layer in layers:
            other = seen.setdefault((layer.part, layer.module), layer.down)
            if other != layer.down:
                raise refusal(
                    self.name, f"tensors {other!r} and {layer.down!r} adapt the same layer"
                )

    def _alphas(self) -> dict[str, float]:
        found = {}
        try:
            with self.header.path.open("rb") as stream:
                for module, roles in self.adapters.items():
                    if name := roles.get("alpha"):
                        tensor = self.header.tensors[name]
                        stream.seek(tensor.begin)
                        found[module] = self._number(name, tensor, stream.read(8))
        except OSError as error:
            raise refusal(self.name, f"it cannot be read: {error.strerror or error}") from None
        return found

    def _number(self, name: str, tensor: StoredTensor, data: bytes) -> float:
        formats = {"F32": "<f", "F16": "<e", "F64": "<d", "I64": "<q", "I32": "<i"}
        size = tensor.end - tensor.begin
        if tensor.elements != 1 or tensor.dtype not in {*formats, "BF16"} or len(data) < size:
            raise refusal(
                self.name,
                f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}; one number was expected",
            )
        if tensor.dtype == "BF16":
            data, size, layout = b"\0\0" + data[:2], 4, "<f"
        else:
            layout = formats[tensor.dtype]
        value = float(struct.unpack(layout, data[:size])[0])
        if not math.isfinite(value):
            raise refusal(self.name, f"tensor {name!r} is {value}; a finite number was expected")
        return value

    def _scale(self, module: str, part: Kind, rank: int, alphas: Mapping[str, float]) -> float:
        stated = alphas.get(module)
        scale = self._by_metadata(module, part, rank) if stated is None else stated / rank
        if abs(scale) > _LARGEST_SCALE:
            raise refusal(self.name, f"module {module!r} has the scale {scale:g}")
        return scale

    def _by_metadata(self, module: str, part: Kind, rank: int) -> float:
        """Return alpha / rank as PEFT's configuration, which diffusers keeps, states it; else 1."""
        stated, prefix = self.stated, f"{DIFFUSERS[part]}."
        if stated.get(prefix + "use_dora"):
            raise refusal(self.name, "its metadata say DoRA, and only LoRA is read")
        alpha = stated.get(prefix + "lora_alpha", rank)
        patterns = stated.get(prefix + "alpha_pattern")
        if isinstance(patterns, dict):
            # A pattern is a module's name or its end. Looked up, not tried one by one: a header
            # has room for hundreds of thousands.
            parts = module.removeprefix(prefix).split(".")
            ends = (".".join(parts[start:]) for start in range(len(parts)))
            alpha = next((patterns[end] for end in ends if end in patterns), alpha)
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or not abs(alpha) <= _LARGEST_ALPHA:
            raise refusal(self.name, f"its metadata state alpha {str(alpha)[:40]!r}")
        return float(alpha) / (math.sqrt(rank) if stated.get(prefix + "use_rslora") else rank)

    def _metadata(self) -> dict[str, Any]:
        try:
            stated = json.loads(self.header.metadata.get(METADATA_KEY, "{}"))
        except (ValueError, RecursionError):
            stated = None
        if not isinstance(stated, dict):
            raise refusal(self.name, f"its metadata {METADATA_KEY!r} are no JSON object")
        return stated
