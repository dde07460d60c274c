"""A node's cache of model files: one copy for all its replicas, bounded, and never half of one.

    files/{id}             an object's bytes, {id} by where it lies and its ETag
    files/{id}.json        its size, time of change and checksum, as they were when it was checked
    models/{id}/{name}/    a model: hard links to its files, so that what a new version has in
                           common with the old one is neither read nor kept twice
    models/{id}.json       what it is made of; its time of change is that of the last use
    locks/                 by flock, so that whoever is killed holds none

A model that a process uses is locked by it as long as it lives and is not removed; where it is to
stay only for some time after its last use, it is locked while it is asked for. Whoever comes while
another one downloads waits for that. A file that is there and not what it was is downloaded again
and takes the place of the old one, which whoever has it open keeps. Nothing waits for the disk to
have written what it was given: what was checked before this machine's last start, which may have
been a power failure, is read whole to be believed once more.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from serve.errors import ConfigurationError
from serve.model_cache.checksums import Checksum, digests_of
from serve.model_cache.remote_files import RemoteFile
from serve.model_cache.room import GIB, PART, Room, changed_at

_POLL_S = 0.2
_TELL_EVERY_S = 10.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_log = logging.getLogger("ray.serve")

Fetch = Callable[[Sequence[tuple[RemoteFile, int]]], dict[str, Checksum | None]]
"""Reads objects into files of their sizes, and returns by what each was checked."""

_in_use: dict[Path, int] = {}  # locks of models that this process uses, to its end


@dataclass(frozen=True)
class _Kept:
    """What is known of a file that was checked."""

    size: int
    mtime_ns: int
    boot: str
    checksum: Checksum | None


class NodeCache:
    """Of one folder; any number of processes may have one.

    Args:
        root: The folder, made if absent.
        most_bytes: Of all files.
        by_checksum: Whether files that are there are read whole to be believed.
        kept_s: That a model stays after its last use; None: as long as the process lives.
    """

    def __init__(
        self,
        root: Path,
        most_bytes: int,
        *,
        by_checksum: bool = False,
        kept_s: float | None = None,
    ) -> None:
        self._root = root
        self._by_checksum = by_checksum
        self._is_held = kept_s is None
        self._room = Room(root, most_bytes, kept_s or 0.0)

    def model(self, place: str, name: str, files: Sequence[RemoteFile], fetch: Fetch) -> Path:
        """Return the folder of a model's files on this node, which stays as long as it was said.

        Args:
            place: Where it comes from: the same for all its versions.
            name: Of the folder.
            files: That it has.
            fetch: For those that are not here.

        Raises:
            ConfigurationError: The cache or the disk is too small, or the folder not to be written.
        """
        version = _hash(json.dumps([asdict(each) for each in files]))
        model = f"{_hash(place)}-{version}"
        try:
            for folder in ("files", "models", "locks"):
                (self._root / folder).mkdir(parents=True, exist_ok=True)
            with self._used(model):
                if not self._is_whole(place, model, name, files):
                    with self._locked(f"{model}.fetch", files):
                        self._complete(place, model, name, files, fetch)
                os.utime(self._root / "models" / f"{model}.json")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                whole = sum(file.size for file in files)
                raise self._room.lacking(f"{self._root} has no space left.", whole) from error
            raise ConfigurationError(
                f"The cache of files cannot be used: {error.strerror or error}.",
                field="model.source.cache_dir",
                value=str(self._root),
                allowed="a folder of a local disk that this process may write",
            ) from error
        return self._folder(model, name)

    def newest(self, place: str, name: str) -> Path | None:
        """Return the folder of the version used last, if whole, for when nobody can be asked."""
        models = self._root / "models"
        records = sorted(models.glob(f"{_hash(place)}-*.json"), key=changed_at, reverse=True)
        for record in records:
            model = record.stem
            # A cache that cannot be written has none either, and is not what fails now.
            with suppress(OSError, ValueError, TypeError), self._used(model):
                files = [RemoteFile(**each) for each in json.loads(record.read_text())]
                if self._is_whole(place, model, name, files):
                    return self._folder(model, name)
        return None

    def _folder(self, model: str, name: str) -> Path:
        return self._root / "models" / model / name

    def _id(self, place: str, file: RemoteFile) -> str:
        return _hash(json.dumps([place, file.key, file.etag, file.size]))

    def _is_whole(self, place: str, model: str, name: str, files: Sequence[RemoteFile]) -> bool:
        record = self._root / "models" / f"{model}.json"
        return record.is_file() and all(
            self._is_right(place, file, self._folder(model, name) / file.path) for file in files
        )

    def _is_right(self, place: str, file: RemoteFile, path: Path) -> bool:
        """Whether a file of the cache is as it was when it was checked."""
        record = self._root / "files" / f"{self._id(place, file)}.json"
        try:
            kept, now = _kept_in(record.read_bytes()), path.stat()
            if (now.st_size, now.st_mtime_ns) != (kept.size, kept.mtime_ns):
                return False
            is_of_before = kept.boot != _boot()
            checksum = kept.checksum
            if checksum is None or not (self._by_checksum or is_of_before):
                return not is_of_before
            with path.open("rb") as opened:
                if not checksum.is_of(digests_of(opened.fileno(), file.size, checksum)):
                    return False
            if is_of_before:
                self._write(record, asdict(replace(kept, boot=_boot())))
            return True
        except (OSError, ValueError, TypeError):
            return False

    def _complete(
        self, place: str, model: str, name: str, files: Sequence[RemoteFile], fetch: Fetch
    ) -> None:
        """Download what is missing and link it; alone with this model."""
        own = self._root / "files"
        parts: list[tuple[RemoteFile, Path, int]] = []
        try:
            with self._locked("room"):
                missing = [
                    file
                    for file in files
                    if not self._is_right(place, file, own / self._id(place, file))
                ]
                self._room.make(
                    model,
                    {self._id(place, file) for file in files},
                    whole=sum(file.size for file in files),
                    needed=sum(file.size for file in missing),
                )
                for file in missing:
                    part = own / f"{self._id(place, file)}{PART}-{os.getpid()}"
                    target = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
                    parts.append((file, part, target))
                    fcntl.flock(target, fcntl.LOCK_EX)
                    if file.size:
                        os.posix_fallocate(target, 0, file.size)
            checksums = fetch([(file, target) for file, _, target in parts])
            for file, part, target in parts:
                kept = own / self._id(place, file)
                # It has a link of its model before it can be taken for one that nobody needs.
                self._link(part, self._folder(model, name) / file.path)
                self._write(
                    kept.with_name(f"{kept.name}.json"), asdict(_kept(target, checksums[file.path]))
                )
                os.replace(part, kept)
        finally:
            for _, part, target in parts:
                part.unlink(missing_ok=True)
                os.close(target)
        for file in files:
            self._link(own / self._id(place, file), self._folder(model, name) / file.path)
        record = self._root / "models" / f"{model}.json"
        self._write(record, [asdict(each) for each in files])

    def _link(self, file: Path, link: Path) -> None:
        """Make a file a model's; what had its place goes."""
        with suppress(FileNotFoundError):
            if os.path.samefile(file, link):
                return
        link.parent.mkdir(parents=True, exist_ok=True)
        beside = link.with_name(f".{link.name}.{os.getpid()}")
        beside.unlink(missing_ok=True)
        os.link(file, beside)
        os.replace(beside, link)

    def _write(self, path: Path, told: object) -> None:
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(told))
        os.replace(beside, path)

    @contextmanager
    def _used(self, model: str) -> Iterator[None]:
        """Let nobody remove a model meanwhile; of a cache that is held never again."""
        path = self._root / "locks" / f"{model}.use"
        if path in _in_use:
            yield
            return
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if self._is_held:
            _in_use[path] = lock
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield
        finally:
            if not self._is_held:
                os.close(lock)

    @contextmanager
    def _locked(self, name: str, files: Sequence[RemoteFile] = ()) -> Iterator[None]:
        """Hold a lock; who waits long for a download says so."""
        lock = os.open(self._root / "locks" / name, os.O_RDWR | os.O_CREAT, 0o644)
        began = told = time.monotonic()
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(_POLL_S)
                if files and time.monotonic() - told > _TELL_EVERY_S:
                    told = time.monotonic()
                    gib = sum(file.size for file in files) / GIB
                    _log.info(
                        "Another process of this node downloads the model (%.2f GiB); waiting for"
                        " %.0f s.",
                        gib,
                        told - began,
                    )
            yield
        finally:
            os.close(lock)


def _kept(target: int, checksum: Checksum | None) -> _Kept:
    about = os.fstat(target)
    return _Kept(about.st_size, about.st_mtime_ns, _boot(), checksum)


def _kept_in(data: bytes) -> _Kept:
    told = json.loads(data)
    checksum = told.pop("checksum")
    return _Kept(**told, checksum=checksum and Checksum(**checksum))


@cache
def _boot() -> str:
    """Name this start of the machine; where nothing tells it, no start is the same."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return uuid.uuid4().hex


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
