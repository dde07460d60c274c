"""A model of an S3 store as this node has it: the settings, with a path that everybody can read."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from serve.errors import ConfigurationError, StorageUnavailable
from serve.model_cache.checksums import Checksum
from serve.model_cache.node_cache import NodeCache
from serve.model_cache.remote_files import (
    SCHEME,
    RemoteFile,
    Source,
    chosen,
    index_in,
    is_index,
    not_there,
    source_of,
)
from serve.model_cache.room import GIB
from serve.model_cache.transfer import DamagedObject, ObjectChanged, Transfer
from serve.model_settings import ModelSettings

_LOOKS = 3  # at what the store has, if it changes while it is read
_TELL_EVERY_S = 5.0
_log = logging.getLogger("ray.serve")


def on_this_node(settings: ModelSettings) -> ModelSettings:
    """Return the settings with a local path; those of a model that is no object are returned as is.

    The first process of a node downloads, the others wait for it. Where the store does not answer,
    the version that this node used last is taken, if it is whole.

    Raises:
        ConfigurationError: There is no such model, or no room for it.
        StorageUnavailable: The store cannot be asked, and there is no version here.
    """
    if not settings.path.startswith(SCHEME):
        return settings
    source = source_of(settings.path)
    about = settings.source
    cache = NodeCache(
        Path(about.cache_dir).expanduser(),
        int(about.cache_gib * GIB),
        by_checksum=about.verify == "checksum",
    )
    place = f"{about.endpoint_url or ''} {source}"
    # A single file lies in a folder of its store's name, as one of a disk does.
    name = "checkpoint" if source.is_file else source.name
    transfer = Transfer(about, source, connections=about.connections)
    try:
        folder = copied(cache, place, name, transfer, lambda: files_of(transfer, source))
    except StorageUnavailable as error:
        known = cache.newest(place, name)
        if known is None:
            raise
        _log.warning("%s The version of %s that is here is taken.", error.message, source)
        folder = known
    path = folder / source.name if source.is_file else folder
    return settings.model_copy(update={"path": str(path)})


def copied(
    cache: NodeCache,
    place: str,
    name: str,
    transfer: Transfer,
    look: Callable[[], Sequence[RemoteFile]],
) -> Path:
    """Return the folder of what a store has now; what is not here is downloaded.

    Args:
        cache: Of this node.
        place: As of `NodeCache.model`.
        name: Likewise.
        transfer: Downloads.
        look: At what there is; asked again where that changes while it is read.

    Raises:
        ConfigurationError: It does not come whole, or there is no room for it.
        StorageUnavailable: The store does not answer.
    """
    source, why = transfer.source, ""
    for _ in range(_LOOKS):
        files = look()

        def fetch(wanted: Sequence[tuple[RemoteFile, int]]) -> dict[str, Checksum | None]:
            with _told(transfer, files):  # noqa: B023 - called in this turn
                return transfer.fetch(wanted)

        try:
            return cache.model(place, name, files, fetch)
        except ObjectChanged:
            why = f"{source} is replaced while it is read, again and again."
        except DamagedObject as damaged:
            why = f"What the store sent of {damaged} is not what its checksum says."
        _log.warning("%s It is looked at again.", why)
    raise ConfigurationError(
        why,
        field="model.path",
        value=str(source),
        allowed="whole objects that nobody replaces while replicas start",
    )


def files_of(transfer: Transfer, source: Source) -> tuple[RemoteFile, ...]:
    """Return the files of a model as its store has them now.

    Raises:
        ConfigurationError: There is none.
        StorageUnavailable: The store does not answer.
    """
    objects = transfer.listing()
    index = None
    if not source.is_file:
        key = next((key for key, _, _ in objects if is_index(key, source)), None)
        if key is None:
            raise not_there(source)
        index = index_in(transfer.small(key), source)
    files = chosen(source, objects, index)
    if not files:
        raise not_there(source)
    return files


@contextmanager
def _told(transfer: Transfer, files: Sequence[RemoteFile]) -> Iterator[None]:
    """Say how far a download is, every few seconds, and how fast it was."""
    source = transfer.source
    over, began = threading.Event(), time.monotonic()
    whole = sum(file.size for file in files) / GIB

    def tell() -> None:
        while not over.wait(_TELL_EVERY_S):
            done = transfer.done_bytes / GIB
            if done:
                rate = done / (time.monotonic() - began)
                _log.info("%s: %.2f of %.2f GiB, %.2f GiB/s", source, done, whole, rate)

    teller = threading.Thread(target=tell, name="model-progress", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
    if transfer.done_bytes:
        done, seconds = transfer.done_bytes / GIB, time.monotonic() - began
        _log.info("%s: %.2f GiB came in %.1f s, %.2f GiB/s", source, done, seconds, done / seconds)
