"""A model of an S3 store without its weights, for who builds the application or takes requests.

They read configurations, LoRAs and what files of weights say in their headers. So those files have
their size, their header and what notes on quantisation they hold; the rest of them is a hole.
Nothing must ever be computed with them, and no stage gets to see them. Kilobytes, beside the cache
that models come to.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

from serve.checkpoints.fp8_notes import NOTE
from serve.checkpoints.header import LONGEST_HEADER, read_header
from serve.errors import ConfigurationError, StorageUnavailable
from serve.model_cache.node_copy import files_of
from serve.model_cache.remote_files import SCHEME, RemoteFile, source_of
from serve.model_cache.room import changed_at
from serve.model_cache.transfer import DamagedObject, ObjectChanged, Transfer
from serve.model_settings import ModelSettings
from serve.whole_folder import written_whole

_FOLDER = "described"
_KEPT = 16  # descriptions of a node; the longest unused go
_LOOKS = 3  # at what the store has, if it changes while it is read
_FIRST_BYTES = 1 << 20  # most headers are shorter


def described_on_this_node(settings: ModelSettings) -> ModelSettings:
    """Return the settings with the local path of a description; others than of S3 as they are.

    Where the store does not answer, the one used last is taken.

    Raises:
        ConfigurationError: There is no such model, or the folder cannot be written.
        StorageUnavailable: The store cannot be asked, and there is none here.
    """
    if not settings.path.startswith(SCHEME):
        return settings
    source = source_of(settings.path)
    about = settings.source
    root = Path(about.cache_dir).expanduser() / _FOLDER
    place = _hash(f"{about.endpoint_url or ''} {source}")
    name = "checkpoint" if source.is_file else source.name
    transfer = Transfer(about, source, connections=about.connections)
    try:
        folder = _described(root, place, name, transfer)
    except StorageUnavailable:
        known = sorted(root.glob(f"{place}-*"), key=changed_at)
        if not known:
            raise
        folder = known[-1] / name
    except OSError as error:
        raise ConfigurationError(
            f"What a model's files say cannot be kept: {error.strerror or error}.",
            field="model.source.cache_dir",
            value=about.cache_dir,
            allowed="a folder of a local disk that this process may write",
        ) from error
    path = folder / source.name if source.is_file else folder
    return settings.model_copy(update={"path": str(path)})


def _described(root: Path, place: str, name: str, transfer: Transfer) -> Path:
    for _ in range(_LOOKS):
        files = files_of(transfer, transfer.source)
        target = root / f"{place}-{_hash(json.dumps([asdict(each) for each in files]))}"
        try:
            if not target.is_dir():
                _write(files, target, name, transfer)
        except (ObjectChanged, DamagedObject):
            continue
        os.utime(target)
        return target / name
    raise ConfigurationError(
        f"{transfer.source} is replaced while it is read, or comes damaged, again and again.",
        field="model.path",
        value=str(transfer.source),
        allowed="whole objects that nobody replaces while replicas start",
    )


def _write(files: Sequence[RemoteFile], target: Path, name: str, transfer: Transfer) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in sorted(target.parent.iterdir(), key=changed_at)[: 1 - _KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    with written_whole(target) as folder, ExitStack() as opened:
        whole = []
        for file in files:
            path = folder / name / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            if file.is_weights:
                _write_header(file, path, transfer)
            else:
                whole.append((file, opened.enter_context(path.open("w+b")).fileno()))
        transfer.fetch(whole)


def _write_header(file: RemoteFile, path: Path, transfer: Transfer) -> None:
    data = transfer.piece(file, 0, min(file.size, _FIRST_BYTES))
    end = min(8 + int.from_bytes(data[:8], "little"), file.size)
    if len(data) < end <= 8 + LONGEST_HEADER:
        data += transfer.piece(file, len(data), end - len(data))
    with path.open("wb") as stream:
        stream.write(data[:end])
        stream.truncate(file.size)
    notes = []
    with suppress(ConfigurationError):  # which whoever reads it is told by its last name
        header = read_header(path)
        notes = [at for name, at in header.tensors.items() if name.endswith(f".{NOTE}")]
    with path.open("r+b") as stream, ThreadPoolExecutor(transfer.connections) as pool:
        pieces = pool.map(lambda at: transfer.piece(file, at.begin, at.end - at.begin), notes)
        for at, piece in zip(notes, pieces, strict=True):
            os.pwrite(stream.fileno(), piece, at.begin)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
