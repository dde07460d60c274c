"""Which objects of a bucket are a model's files: all that it needs, and nothing that is pickled."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from serve.errors import ConfigurationError

SCHEME = "s3://"
INDEX = "model_index.json"
_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
_LORAS = "loras"
_BUCKET = r"[A-Za-z0-9._-]{3,63}"  # what botocore lets pass, as long as S3 has it
_MOST_FILES = 10_000


@dataclass(frozen=True, slots=True)
class Source:
    """What `s3://bucket/prefix` names.

    Attributes:
        bucket: Its name.
        prefix: Of a folder's keys, without a slash at the end, or the one key of a file.
    """

    bucket: str
    prefix: str

    @property
    def name(self) -> str:
        """Of the folder or file: its last part."""
        return self.prefix.rsplit("/", 1)[-1] or self.bucket

    @property
    def is_file(self) -> bool:
        """Whether it is a single checkpoint."""
        return self.prefix.endswith(".safetensors")

    @property
    def below(self) -> str:
        """With what the keys of its files begin."""
        return self.prefix if self.is_file or not self.prefix else f"{self.prefix}/"

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.prefix}".rstrip("/")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One object, as a listing tells of it.

    Attributes:
        path: Relative to the model's folder, with slashes.
        key: In the bucket.
        size: bytes.
        etag: With its quotes, as HTTP has it.
    """

    path: str
    key: str
    size: int
    etag: str

    @property
    def is_weights(self) -> bool:
        """Whether it is of the model's own weights; LoRAs are none."""
        return self.path.endswith(".safetensors") and not self.path.startswith(f"{_LORAS}/")


def source_of(path: str) -> Source:
    """Return what a path that begins with `s3://` names.

    Raises:
        ConfigurationError: It has no bucket that can be one, or a part that is no name.
    """
    bucket, _, prefix = path.removeprefix(SCHEME).strip("/").partition("/")
    if not re.fullmatch(_BUCKET, bucket) or (prefix and not _is_plain(prefix)):
        raise ConfigurationError(
            "This is no address of a model in an S3 store.",
            field="model.path",
            value=path,
            allowed="s3://BUCKET/FOLDER in Diffusers layout, or s3://BUCKET/.../FILE.safetensors",
        )
    return Source(bucket, prefix)


def is_index(key: str, source: Source) -> bool:
    """Return whether a key is that of the folder's `model_index.json`."""
    return key == source.below + INDEX


def chosen(
    source: Source, objects: Iterable[tuple[str, int, str]], index: Mapping[str, Any] | None
) -> tuple[RemoteFile, ...]:
    """Return the model's files among objects, by path.

    Of a Diffusers folder the parts that its index names and `loras`; Hugging Face's repositories
    hold the same weights as a single file beside them. Files of other kinds than safetensors, JSON
    and tokenizers' text stay where they are: nothing that is pickled ever comes to a node.

    Args:
        source: The model.
        objects: Key, size in bytes and ETag of all that begin with its prefix.
        index: Of the folder; None of a single file.

    Raises:
        ConfigurationError: There are none, or too many, or a key that would lead out of a folder.
    """
    folders = {_LORAS, *(name for name, what in (index or {}).items() if isinstance(what, list))}
    found: dict[str, RemoteFile] = {}
    for key, size, etag in objects:
        if source.is_file:
            if key == source.prefix:
                found[source.name] = RemoteFile(source.name, key, size, etag)
            continue
        path = key.removeprefix(source.below)
        if not key.startswith(source.below) or not path.endswith(_SUFFIXES):
            continue
        if not _is_plain(path):
            raise ConfigurationError(
                f"A key of {source} would lead out of a folder.",
                field="model.path",
                value=key,
                allowed="keys of plain names, with single slashes between them",
            )
        parts = PurePosixPath(path).parts
        if parts[0] in folders if len(parts) > 1 else path.endswith(".json"):
            found[path] = RemoteFile(path, key, size, etag)
    if len(found) > _MOST_FILES:
        raise ConfigurationError(
            f"{source} has {len(found)} files, more than a model has.",
            field="model.path",
            value=str(source),
            allowed=f"one model's folder, of at most {_MOST_FILES} files",
        )
    return tuple(found[path] for path in sorted(found))


def index_in(data: bytes, source: Source) -> Mapping[str, Any]:
    """Return what a folder's index holds.

    Raises:
        ConfigurationError: It is no JSON object.
    """
    try:
        index = json.loads(data)
    except (ValueError, RecursionError):
        index = None
    if not isinstance(index, dict):
        raise ConfigurationError(
            f"{source}/{INDEX} is no JSON object.",
            field="model.path",
            value=str(source),
            allowed="a folder in Diffusers layout, as save_pretrained writes it",
        )
    return index


def not_there(source: Source) -> ConfigurationError:
    """Return the error of a model of which the store has nothing."""
    what = "such object" if source.is_file else INDEX
    return ConfigurationError(
        f"{source} has no {what}.",
        field="model.path",
        value=str(source),
        allowed="s3://BUCKET/FOLDER in Diffusers layout, or s3://BUCKET/.../FILE.safetensors",
    )


def _is_plain(path: str) -> bool:
    parts = path.split("/")
    return all(part not in ("", ".", "..") for part in parts) and not any(
        character in path for character in ("\0", "\\")
    )
