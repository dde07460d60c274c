"""Whether what answered 200 is an object store at all.

A login page, a caching proxy or a wrong endpoint may answer 200 to everything. Believed, it would
have stored every picture, hold records that nobody can read, and know of nothing that is pending.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serve.errors import StorageUnavailable
from serve.storage_errors import host_of


def etag_of(answer: Mapping[str, Any], endpoint_url: str | None) -> str:
    """Return the ETag of an object that was read or written; every S3 store tells it.

    Args:
        answer: Of boto3.
        endpoint_url: Of the store.

    Raises:
        StorageUnavailable: The answer has none.
    """
    etag = answer.get("ETag")
    if not etag:
        raise no_store(endpoint_url)
    return str(etag)


def contents_of(page: Mapping[str, Any], endpoint_url: str | None) -> Sequence[Any]:
    """Return the objects in a page of a listing.

    Args:
        page: boto3's answer.
        endpoint_url: Of the store.

    Raises:
        StorageUnavailable: It is no listing: that names its bucket.
    """
    if "Name" not in page:
        raise no_store(endpoint_url)
    contents: Sequence[Any] = page.get("Contents", ())
    return contents


def no_store(endpoint_url: str | None) -> StorageUnavailable:
    """Return what is said of an answer that no object store gives.

    Args:
        endpoint_url: Of the store.
    """
    where = host_of(endpoint_url)
    return StorageUnavailable(
        f"{where} answered, but not as an object store does.",
        field="storage.endpoint_url",
        value=where,
        allowed="an S3 endpoint with no login page or cache of a proxy in between",
    )
