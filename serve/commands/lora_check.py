"""Which LoRAs lie in a model's folders, what they adapt, and why one cannot be used.

Of headers and alphas alone, as a request would be answered before a matrix is read; those of the
object store are not downloaded for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve.checkpoints.key_names import Kind
from serve.checkpoints.lora_file import LoraFile
from serve.commands.finding import Finding
from serve.config import ModelSettings
from serve.errors import KelvinError
from serve.lora_settings import LoraSettings
from serve.loras import LoraLibrary
from serve.requests import GenerateRequest

_PARTS: dict[Kind, str] = {
    "transformer": "transformer",
    "clip_l": "CLIP-L",
    "clip_g": "CLIP-G",
    "t5": "T5",
}
_MOST_SHOWN = 10


def check_loras(model: ModelSettings, settings: LoraSettings) -> list[Finding]:
    """Report what fits in one finding, and what does not in one each.

    At most ten of each are shown; the figures have all that fit.

    Args:
        model: Whose LoRAs; it was checked.
        settings: Section `lora`.
    """
    library = LoraLibrary(model, settings, weights=False)
    try:
        names = library.available()
    except OSError as error:
        return [
            Finding("LoRAs", "failed", f"{error.filename}: {error.strerror}", "make it readable")
        ]
    fitting: list[LoraFile] = []
    refused: list[Finding] = []
    for name in names:
        try:
            library.uses(GenerateRequest.model_validate({"prompt": "a picture", "loras": [name]}))
            fitting.append(library.file(name)[0])
        except KelvinError as error:
            refused.append(Finding("LoRA", "warning", error.message, error.allowed or ""))
    if len(refused) > _MOST_SHOWN:
        more = f"{len(refused) - _MOST_SHOWN} more cannot be used with this model"
        refused = [*refused[:_MOST_SHOWN], Finding("LoRA", "warning", more)]
    return [_of_those_that_fit(fitting), *refused]


def _of_those_that_fit(files: Sequence[LoraFile]) -> Finding:
    shown = "; ".join(f"{file.name} ({_parts(file)})" for file in files[:_MOST_SHOWN])
    more = f"; and {len(files) - _MOST_SHOWN} more" if len(files) > _MOST_SHOWN else ""
    return Finding(
        "LoRAs",
        "ok",
        f"{len(files)} for this model: {shown}{more}" if files else "none for this model",
        figures={
            file.name: {
                "file": str(file.path),
                "disk_bytes": file.header.size,
                "ranks": {part: file.rank(part) for part in _PARTS if file.of(part)},
                "layers": {part: len(file.of(part)) for part in _PARTS if file.of(part)},
            }
            for file in files
        },
    )


def _parts(file: LoraFile) -> str:
    return ", ".join(
        f"rank {file.rank(part)} of {label}" for part, label in _PARTS.items() if file.of(part)
    )
