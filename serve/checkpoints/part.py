"""One part of a model, wherever its tensors lie: their names here, and where each comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from serve.checkpoints.fp8_notes import MARKER, NOTE, Fp8Notes, leaf_of, read_notes
from serve.checkpoints.header import StoredTensor
from serve.checkpoints.key_names import Kind, Target, translator
from serve.checkpoints.tensor_files import TensorFiles
from serve.errors import ConfigurationError

SCALE = ".weight_scale"
INPUT_SCALE = ".input_scale"
PROJECTION = "text_projection.weight"
# What tools leave beside a part's weights and nothing reads.
_IDLE_NAMES = {MARKER, "logit_scale", "spiece_model", "text_model.embeddings.position_ids"}
_CLIP_L_WIDTH = 768


@dataclass(frozen=True, slots=True)
class Source:
    """Where one tensor comes from.

    Attributes:
        stored: Its name in the files, prefix included; None: an identity matrix.
        dtype: As the format spells it.
        shape: After `part` and `squeezed`.
        part: (i, n): the i-th of n equal parts of its rows.
        swapped: The halves of its rows change places.
        squeezed: Trailing dimensions of 1 are dropped.
    """

    stored: str | None
    dtype: str
    shape: tuple[int, ...]
    part: tuple[int, int] | None = None
    swapped: bool = False
    squeezed: bool = False


@dataclass(frozen=True)
class Part:
    """A transformer, text encoder or VAE in files.

    Attributes:
        kind: Which; None in a Diffusers directory, where nothing needs to be translated.
        files: That hold it, perhaps among others.
        prefix: Of its names there.
        sources: diffusers' name -> where it comes from; scales as `X.weight_scale` and
            `X.input_scale`, whatever the files call them.
        notes: Of its quantisation; `full_precision` by diffusers' names.
    """

    kind: Kind | None
    files: TensorFiles
    prefix: str
    sources: Mapping[str, Source]
    notes: Fp8Notes

    @classmethod
    def of(cls, files: TensorFiles, prefix: str = "", kind: Kind | None = None) -> Part:
        """Translate a part's names.

        Raises:
            ConfigurationError: A quantisation that Kelvin does not read, two tensors for one place,
                or rows that cannot be parted.
        """
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in files.tensors.items()
            if name.startswith(prefix)
        }
        notes = read_notes(files, own, prefix)
        split = {name: _split(name) for name in own if not _is_idle(name)}
        translate = translator(kind, {m for m, _ in split.values()}) if kind else _as_it_is
        sources: dict[str, Source] = {}
        full_precision: set[str] = set()
        for name, (module, leaf) in split.items():
            for target in translate(module):
                ours = f"{target.module}.{leaf}" if leaf else target.module
                if ours in sources:
                    raise _misfit(files, prefix + name, f"takes the same place as {ours!r} does")
                dtype = notes.read_as.get(module) if leaf == "weight" else None
                sources[ours] = _source(files, prefix + name, own[name], target, leaf, dtype)
                if module in notes.full_precision:
                    full_precision.add(target.module)
        if kind == "clip_l":
            _set_projection(sources)
        return cls(
            kind, files, prefix, sources, replace(notes, full_precision=frozenset(full_precision))
        )

    def file_of(self, name: str) -> str:
        """Return the file that holds a tensor, by its name here."""
        stored = self.sources[name].stored
        return str(self.files.paths[0] if stored is None else self.files.file_of[stored])

    @property
    def weights(self) -> dict[str, Source]:
        """Return the tensors that are a model's own: no scales."""
        return {
            name: source
            for name, source in self.sources.items()
            if not name.endswith((SCALE, INPUT_SCALE))
        }

    @property
    def stored_bytes(self) -> int:
        """Return what the part takes on disk."""
        stored = {source.stored for source in self.sources.values() if source.stored is not None}
        return sum(self.files.tensors[name].end - self.files.tensors[name].begin for name in stored)


def _as_it_is(module: str) -> tuple[Target, ...]:
    return (Target(module),)


def _is_idle(name: str) -> bool:
    return name in _IDLE_NAMES or name.endswith("." + NOTE)


def _split(name: str) -> tuple[str, str]:
    """Return a tensor's module and today's name of its last part; a bare tensor is a module."""
    module, dot, leaf = name.rpartition(".")
    return (module, leaf_of(leaf)) if dot else (name, "")


def _source(
    files: TensorFiles,
    stored: str,
    tensor: StoredTensor,
    target: Target,
    leaf: str,
    dtype: str | None,
) -> Source:
    shape, part, swapped = tensor.shape, target.part, target.swapped
    if leaf in ("weight_scale", "input_scale") and tensor.elements == 1:
        part, swapped = None, False  # of the whole tensor, so of each of its parts
    pieces = part[1] if part else 2 if swapped else 1
    if pieces > 1 and (not shape or shape[0] % pieces):
        raise _misfit(files, stored, f"has shape {list(shape)}; {pieces} equal parts were expected")
    if part:
        shape = (shape[0] // pieces, *shape[1:])
    squeezed = target.squeezed and leaf == "weight" and len(shape) > 2
    if squeezed:
        if any(side != 1 for side in shape[2:]):
            raise _misfit(files, stored, f"has shape {list(shape)}; a 1x1 convolution was expected")
        shape = shape[:2]
    return Source(stored, dtype or tensor.dtype, shape, part, swapped, squeezed)


def _set_projection(sources: dict[str, Source]) -> None:
    """Let CLIP-L's pooled output be what it is before projection, as SD3 was trained.

    ComfyUI does not project it, diffusers' converter puts an identity matrix there. A projection
    of another width is a small model's own.
    """
    width = sources.get("text_model.final_layer_norm.weight")
    if width is None or len(width.shape) != 1:
        return
    if width.shape[0] == _CLIP_L_WIDTH or PROJECTION not in sources:
        sources[PROJECTION] = Source(None, width.dtype, width.shape * 2)


def _misfit(files: TensorFiles, name: str, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"Tensor {name!r} in {files.file_of[name]} {what}.", field="model.path", value=name
    )
