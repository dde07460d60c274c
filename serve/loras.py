"""The LoRAs that requests to one model may name: where they are, and what each adapts.

Files lie in `loras` of the model's own folder and of the models folder, and, if set, in the object
store. A name is the path below, without suffix; both are found, with suffix too, as ComfyUI names
files. Nothing is kept but headers: a file that changes is read anew.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from deployments.payloads import LoraUse
from serve.checkpoints.folders import candidates, check_inside
from serve.checkpoints.key_names import Kind
from serve.checkpoints.lora_file import MOST_RANKS, BaseModel, LoraFile, read_lora
from serve.config import ModelSettings, StorageSettings
from serve.errors import ConfigurationError, InvalidRequest, KelvinError, StorageUnavailable
from serve.lora_cache import LoraCache
from serve.lora_choice import LONGEST_NAME, SUFFIX
from serve.lora_settings import LoraSettings
from serve.model_dir import lora_roots, resolve_model_dir
from serve.requests import GenerateRequest

FOLDER = "loras"
_MOST_NAMED = 10
_SIXTEEN = 16  # ranks are held in pages of so many
_USUAL_RANKS = 128  # eight LoRAs of rank 16 beside one another
_HEADERS_KEPT = 256
_LISTED_AGAIN_S = 5.0
TEXT_PARTS: tuple[Kind, ...] = ("clip_l", "clip_g", "t5")

_log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class LoraUses:
    """What of a request's LoRAs goes to which stage."""

    text: tuple[LoraUse, ...] = ()
    denoise: tuple[LoraUse, ...] = ()


class LoraLibrary:
    """Finds LoRAs. Reads files, and downloads them: not for an event loop. Thread-safe.

    Args:
        model: Whose LoRAs.
        settings: Section `lora`.
        storage: Of the bucket, where `lora.s3_prefix` is set.
        weights: Whether this process needs the model's, as of `resolve_model_dir`.
        only_text: Look at nothing but text encoders' layers: models that share them may have
            transformers of other sizes.
    """

    def __init__(
        self,
        model: ModelSettings,
        settings: LoraSettings,
        storage: StorageSettings | None = None,
        *,
        weights: bool = True,
        only_text: bool = False,
    ) -> None:
        self._weights = weights
        self._only = TEXT_PARTS if only_text else None
        self._model = model
        self._ranks = settings.ranks
        self._lock = threading.Lock()
        self._base: BaseModel | None = None
        self._headers: OrderedDict[tuple[str, str], LoraFile] = OrderedDict()
        self._names: list[str] = []
        self._listed_at = float("-inf")
        self._cache = None
        if settings.s3_prefix is not None and storage is not None:
            self._cache = LoraCache(storage, settings.s3_prefix, settings)

    @property
    def room(self) -> int:
        """Ranks that a denoiser which starts now makes room for."""
        if self._ranks is not None:
            return self._ranks
        return _USUAL_RANKS if self._cache is not None or self.available() else 0

    def available(self) -> list[str]:
        """Return the names of all there are; without the store's where it does not answer.

        Files that no request could name are left out: of bytes that are no text, say, which no
        answer could hold either.
        """
        with self._lock:
            if time.monotonic() - self._listed_at > _LISTED_AGAIN_S:
                found = {
                    path.relative_to(root / FOLDER).with_suffix("").as_posix()
                    for root in lora_roots(self._model, weights=self._weights)
                    for path in candidates(root, (FOLDER,))
                }
                if self._cache is not None:
                    try:
                        found |= set(self._cache.names())
                    except StorageUnavailable as error:
                        _log.warning("LoRAs of the store cannot be listed: %s", error.message)
                self._names = sorted(name for name in found if _can_be_asked_for(name))
                self._listed_at = time.monotonic()
            return self._names

    def uses(self, request: GenerateRequest) -> LoraUses:
        """Check a request's LoRAs and say which stage needs which.

        Raises:
            InvalidRequest: One is unknown, damaged, or for another model.
            StorageUnavailable: The store, where it must be, does not answer.
        """
        text, denoise, ranks = [], [], 0
        for lora in request.loras:
            file, version = self.file(lora.name)
            ranks += _SIXTEEN * math.ceil(file.rank("transformer") / _SIXTEEN)
            use = LoraUse(file.name, lora.weight, version)
            if file.of(*TEXT_PARTS):
                text.append(use)
            if file.of("transformer"):
                denoise.append(use)
        room = min(MOST_RANKS, _USUAL_RANKS if self._ranks is None else self._ranks)
        if ranks > room:
            raise InvalidRequest(
                f"The LoRAs of the request have {ranks} ranks together, each counted in sixteens.",
                field="loras",
                value=", ".join(lora.name for lora in request.loras),
                allowed=f"at most {room} ranks (lora.ranks)" if room else "none: lora.ranks is 0",
            )
        return LoraUses(tuple(text), tuple(denoise))

    def has_text_part(self, name: str) -> bool:
        """Return whether a LoRA adapts text encoders; raises as `file`."""
        return bool(self.file(name)[0].of(*TEXT_PARTS))

    def file(self, name: str) -> tuple[LoraFile, str]:
        """Return a LoRA's checked header, and the version of its content.

        Raises:
            InvalidRequest: It is unknown, damaged, or for another model.
            StorageUnavailable: The store, where it must be, does not answer.
        """
        name = self._checked(name)
        path, version = self._find(name)
        with self._lock:
            if (name, version) in self._headers:
                self._headers.move_to_end((name, version))
                return self._headers[name, version], version
            if self._base is None:
                folder = resolve_model_dir(self._model, weights=self._weights)
                self._base = BaseModel.of_folder(folder, self._only)
            base = self._base
        file = read_lora(path, name, base)
        with self._lock:
            self._headers[name, version] = file
            while len(self._headers) > _HEADERS_KEPT:
                self._headers.popitem(last=False)
        return file, version

    def _find(self, name: str) -> tuple[Path, str]:
        for root in lora_roots(self._model, weights=self._weights):
            path = root / FOLDER / (name + SUFFIX)
            try:
                if path.is_file():
                    check_inside(root, path, FOLDER)
                    stat = path.stat()
                    return path, f"{stat.st_size}-{stat.st_mtime_ns}"
            except ConfigurationError:
                raise InvalidRequest(
                    f"LoRA {name!r} is a link out of the models folder.",
                    field="loras",
                    value=name,
                    allowed="a file inside it",
                ) from None
            except OSError:  # a name too long for a file, say
                continue
        if self._cache is not None and (found := self._cache.find(name)) is not None:
            return found.path, found.version
        raise self._unknown(name)

    def _checked(self, name: str) -> str:
        if not _is_below(name):
            raise InvalidRequest(
                f"LoRA {name!r} would leave the folder of LoRAs.",
                field="loras",
                value=name,
                allowed=self._known(),
            )
        return name.removesuffix(SUFFIX)

    def _unknown(self, name: str) -> InvalidRequest:
        return InvalidRequest(
            f"There is no LoRA {name!r} here.", field="loras", value=name, allowed=self._known()
        )

    def _known(self) -> str:
        names = self.available()
        if not names:
            return "none: there are no LoRAs for this model"
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        return f"one of: {', '.join(names[:_MOST_NAMED])}{more}"


def _is_below(name: str) -> bool:
    parts = PurePosixPath(name).parts  # of "/x" the first is "/"
    plain = name.isprintable() and "\\" not in name
    return bool(parts) and ".." not in parts and plain and name == "/".join(parts)


def _can_be_asked_for(name: str) -> bool:
    """Return whether a file's name, without suffix, leads a request to it."""
    return _is_below(name) and not name.endswith(SUFFIX) and len(name) <= LONGEST_NAME


def shown_loras(library: LoraLibrary) -> dict[str, object]:
    """Return what `/v1/status` says of a model's LoRAs; blocks."""
    try:
        names: Sequence[str] = library.available()
    except (KelvinError, OSError) as error:
        return {"available": [], "message": str(error)}
    return {"available": list(names)}
