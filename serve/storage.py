"""The S3 client: any store that speaks S3 (AWS, MinIO, SeaweedFS, R2), asynchronous outside.

botocore is synchronous and blocks, so every call runs in a bounded thread pool and never on a
replica's event loop. Conditional writes decide who wins, so a retried write whose first try had
arrived must not be mistaken for a lost race: each write carries a nonce that settles it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import random
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, TypedDict, TypeVar

from botocore.exceptions import BotoCoreError, ClientError

from serve.config import StorageSettings
from serve.errors import StorageUnavailable
from serve.s3_client import s3_client
from serve.storage_answers import contents_of, etag_of, no_store
from serve.storage_errors import error_code, explain, is_about_credentials

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_CONNECTIONS = 16  # threads and pooled connections: one for one
_BETWEEN_CREDENTIALS_S = 2.0
_LONGEST_KEY = 1024  # bytes, S3's limit
_WRITER = "kelvin-writer"  # user metadata: which try of which process wrote the object
_Result = TypeVar("_Result")


class _Condition(TypedDict, total=False):
    IfNoneMatch: str
    IfMatch: str


@dataclass(frozen=True)
class Listed:
    """One object in a listing."""

    key: str
    etag: str
    size: int  # bytes
    modified: float  # seconds of Unix time, by the store's clock


def _unix_time(moment: datetime | None) -> float:
    return time.time() if moment is None else moment.timestamp()


class ObjectStore:
    """One bucket (and prefix) of one S3 store. Thread-safe; keep one per process.

    Every method that touches the store raises StorageUnavailable, which names bucket and endpoint
    and says what to do, never a credential. Keys are relative to `settings.prefix`; a malformed
    key is a ValueError.
    """

    def __init__(self, settings: StorageSettings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="s3")
        self._client: S3Client | None = None
        self._public_client: S3Client | None = None
        self._forgot_at = float("-inf")

    async def put(
        self, key: str, data: bytes, content_type: str, *, if_absent: bool = False
    ) -> bool:
        """Write an object; the store checks an MD5 of what arrived.

        Args:
            key: Relative to the prefix.
            data: The whole object.
            content_type: MIME type that a GET answers with.
            if_absent: Write only if no object of this key exists, atomically.

        Returns:
            True if this call wrote the object, False if `if_absent` found one.
        """
        condition: _Condition = {"IfNoneMatch": "*"} if if_absent else {}
        full = self._full(key)
        etag = await self._run(lambda: self._put(full, data, content_type, condition))
        return etag is not None

    async def swap(self, key: str, data: bytes, content_type: str, etag: str | None) -> str | None:
        """Write an object only if nobody has changed it since, atomically.

        Args:
            key: Relative to the prefix.
            data: The whole object.
            content_type: MIME type that a GET answers with.
            etag: Of the object as it was last seen; None if there was none.

        Returns:
            The ETag of what was written, or None: it is another object by now, or gone, or there.
        """
        condition: _Condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        full = self._full(key)
        return await self._run(lambda: self._put(full, data, content_type, condition))

    async def get(self, key: str) -> bytes | None:
        """Return an object's bytes, or None if there is none."""
        found = await self.get_with_etag(key)
        return None if found is None else found[0]

    async def get_with_etag(self, key: str) -> tuple[bytes, str] | None:
        """Return an object's bytes and the ETag they have, or None if there is none."""
        full = self._full(key)
        return await self._run(lambda: self._get(full))

    async def exists(self, key: str) -> bool:
        """Return whether an object of this key exists."""
        full = self._full(key)
        return await self._run(lambda: self._exists(full))

    async def delete(self, key: str) -> None:
        """Remove an object; none is no error."""
        full = self._full(key)
        await self._run(
            lambda: self._s3().delete_object(Bucket=self.settings.bucket, Key=full) and None
        )

    async def list_keys(self, prefix: str) -> list[str]:
        """Return all keys that start with `prefix`, sorted, relative like every key."""
        return sorted(await self.list_etags(prefix))

    async def list_some(self, prefix: str, after: str, most: int) -> list[str]:
        """Return the first keys that start with `prefix` and come after `after`, sorted.

        Args:
            prefix: Of the keys.
            after: A key, which need not exist; empty: from the first on.
            most: At most so many, from 1 to 1000; the store is asked once.
        """
        return await self._run(lambda: self._list_some(prefix, after, most))

    async def list_etags(self, prefix: str) -> dict[str, str]:
        """Return key -> ETag of all objects whose keys start with `prefix`."""
        return {entry.key: entry.etag for entry in await self.list_entries(prefix)}

    async def list_entries(self, prefix: str) -> list[Listed]:
        """Return what a listing tells of all objects whose keys start with `prefix`."""
        return await self._run(lambda: self._list_entries(prefix))

    def presign(self, key: str, expiry_s: int | None = None) -> str:
        """Return a URL that a plain HTTP client can GET until it expires.

        It blocks: nothing is asked of the store, but the first call makes a client, and temporary
        credentials that have expired are fetched anew.

        Args:
            key: Relative to the prefix.
            expiry_s: Seconds; `settings.url_expiry_s` if absent. Where credentials are temporary
                the URL dies with them, if that is sooner.
        """
        params = {"Bucket": self.settings.bucket, "Key": self._full(key)}
        seconds = self.settings.url_expiry_s if expiry_s is None else expiry_s
        return self._translated(
            lambda: self._s3(public=True).generate_presigned_url(
                "get_object", Params=params, ExpiresIn=seconds
            )
        )

    def s3_uri(self, key: str) -> str:
        """Return `s3://bucket/prefix/key`."""
        return f"s3://{self.settings.bucket}/{self._full(key)}"

    def key_of(self, s3_uri: str) -> str | None:
        """Return the key of one of this store's own URIs; None for anything else."""
        own = f"s3://{self.settings.bucket}/{self.settings.prefix}"
        return s3_uri.removeprefix(own) if s3_uri.startswith(own) else None

    def create_bucket(self) -> None:
        """Create the bucket unless it exists; blocks. For a store that is Kelvin's own."""

        def create() -> None:
            try:
                self._s3().create_bucket(Bucket=self.settings.bucket)
            except ClientError as error:
                if error_code(error) not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise

        self._translated(create)

    def write_and_read(self, key: str) -> None:
        """Write an object, read it and remove it; blocks. For a store that is Kelvin's own.

        Raises:
            StorageUnavailable: One of the three failed.
        """
        bucket, full = self.settings.bucket, self._full(key)

        def write_and_read() -> None:
            s3 = self._s3()
            s3.put_object(Bucket=bucket, Key=full, Body=b"ready")
            s3.get_object(Bucket=bucket, Key=full)["Body"].read()
            s3.delete_object(Bucket=bucket, Key=full)

        self._translated(write_and_read)

    def close(self) -> None:
        """Wait for running calls and close the connections."""
        self._pool.shutdown()
        for client in (self._client, self._public_client):
            if client is not None:
                client.close()

    def _put(self, full: str, data: bytes, content_type: str, condition: _Condition) -> str | None:
        md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        nonce = uuid.uuid4().hex
        tries = self.settings.max_attempts
        for attempt in range(tries):
            try:
                answer = self._s3().put_object(
                    Bucket=self.settings.bucket,
                    Key=full,
                    Body=data,
                    ContentType=content_type,
                    ContentMD5=md5,
                    Metadata={_WRITER: nonce},
                    **condition,
                )
                return etag_of(answer, self.settings.endpoint_url)
            except ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
                if condition and status == 412:
                    return self._written_by(full, nonce, error)
                if "IfMatch" in condition and error_code(error) == "NoSuchKey":
                    return None
                # 409: AWS saw another conditional write of this key in flight and decided nothing.
                if not condition or status != 409 or attempt + 1 == tries:
                    raise
                time.sleep(random.uniform(0, 0.1 * 2**attempt))
        raise AssertionError("unreachable: the last try returns or raises")

    def _written_by(self, full: str, nonce: str, refusal: ClientError) -> str | None:
        """Return the object's ETag if the write that was refused now is the one that made it.

        A retry of our own write, whose first try had arrived, is refused like anybody else's.
        """
        if not refusal.response.get("ResponseMetadata", {}).get("RetryAttempts"):
            return None
        head = self._s3().head_object(Bucket=self.settings.bucket, Key=full)
        return head["ETag"] if head["Metadata"].get(_WRITER) == nonce else None

    def _get(self, full: str) -> tuple[bytes, str] | None:
        try:
            answer = self._s3().get_object(Bucket=self.settings.bucket, Key=full)
            return answer["Body"].read(), etag_of(answer, self.settings.endpoint_url)
        except ClientError as error:
            if error_code(error) == "NoSuchKey":
                return None
            raise

    def _exists(self, full: str) -> bool:
        # GET of one byte, not HEAD: the answer to HEAD has no body, so a missing bucket would look
        # like a missing key.
        try:
            answer = self._s3().get_object(Bucket=self.settings.bucket, Key=full, Range="bytes=0-0")
            answer["Body"].close()
            etag_of(answer, self.settings.endpoint_url)
        except ClientError as error:
            if error_code(error) == "InvalidRange":
                return True
            if error_code(error) == "NoSuchKey":
                return False
            raise
        return True

    def _list_entries(self, prefix: str) -> list[Listed]:
        own = self.settings.prefix
        pages = (
            self._s3()
            .get_paginator("list_objects_v2")
            .paginate(Bucket=self.settings.bucket, Prefix=own + prefix)
        )
        return [
            Listed(
                key=item["Key"].removeprefix(own),
                etag=item.get("ETag", ""),
                size=item.get("Size", 0),
                modified=_unix_time(item.get("LastModified")),
            )
            for page in pages
            for item in contents_of(page, self.settings.endpoint_url)
        ]

    def _list_some(self, prefix: str, after: str, most: int) -> list[str]:
        own = self.settings.prefix
        page = self._s3().list_objects_v2(
            Bucket=self.settings.bucket,
            Prefix=own + prefix,
            StartAfter=own + after if after else "",
            MaxKeys=most,
        )
        return sorted(
            item["Key"].removeprefix(own) for item in contents_of(page, self.settings.endpoint_url)
        )

    def _full(self, key: str) -> str:
        full = self.settings.prefix + key
        parts = key.split("/")
        if any(part in ("", ".", "..") for part in parts) or not full.isprintable():
            raise ValueError(f"malformed key: {key!r}")
        if len(full.encode("utf-8")) > _LONGEST_KEY:
            raise ValueError(f"key longer than {_LONGEST_KEY} bytes: {key[:80]!r}")
        return full

    async def _run(self, call: Callable[[], _Result]) -> _Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._translated, call)

    def _translated(self, call: Callable[[], _Result]) -> _Result:
        try:
            return call()
        except (BotoCoreError, ClientError) as error:
            if is_about_credentials(error):
                self._forget_credentials()
            raise self._explained(error) from None
        except (KeyError, ValueError):  # a date, a size or a length that is none, an unnamed object
            raise no_store(self.settings.endpoint_url) from None

    def _forget_credentials(self) -> None:
        """Let the next call read credentials anew: a client keeps those that it was made with.

        Calls under way keep their client. Not too often, for it costs a fifth of a second.
        """
        with self._lock:
            if time.monotonic() - self._forgot_at > _BETWEEN_CREDENTIALS_S:
                self._forgot_at = time.monotonic()
                self._client = self._public_client = None

    def _explained(self, error: BotoCoreError | ClientError) -> StorageUnavailable:
        return explain(
            error,
            bucket=self.settings.bucket,
            endpoint_url=self.settings.endpoint_url,
            region=self.settings.region,
        )

    def _s3(self, *, public: bool = False) -> S3Client:
        """Return the client, made on first use: making one costs a fifth of a second."""
        with self._lock:
            public = public and self.settings.public_endpoint_url is not None
            client = self._public_client if public else self._client
            if client is None:
                endpoint = (
                    self.settings.public_endpoint_url if public else self.settings.endpoint_url
                )
                client = s3_client(self.settings, endpoint, connections=_CONNECTIONS)
                if public:
                    self._public_client = client
                else:
                    self._client = client
            return client
