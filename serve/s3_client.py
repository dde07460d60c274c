"""How botocore, boto3's core, is set up so that it works alike on AWS, MinIO, SeaweedFS and R2.

Bounded retries and timeouts, SigV4, path-style addresses for own endpoints, no checksum trailers,
and credentials either by boto3's usual chain or from one named file alone.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import botocore.loaders
import botocore.session
from botocore.config import Config
from botocore.exceptions import ProfileNotFound

from serve.errors import StorageUnavailable
from serve.loopback import is_loopback
from serve.storage_errors import host_of
from serve.storage_settings import StoreConnection

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def s3_client(settings: StoreConnection, endpoint_url: str | None, *, connections: int) -> S3Client:
    """Return a client, which is thread-safe; making the first costs a fifth of a second.

    Args:
        settings: Region, credentials, timeouts, tries.
        endpoint_url: Internal or public endpoint; AWS if None.
        connections: How many are kept open, at most.

    Raises:
        StorageUnavailable: The endpoint is no URL, or `credentials_file` cannot be read.
        botocore.exceptions.BotoCoreError: The environment's own AWS settings are wrong.
    """
    session = _session(settings)
    try:
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": "path" if endpoint_url else "auto"},
            connect_timeout=settings.connect_timeout_s,
            read_timeout=settings.read_timeout_s,
            retries={"mode": "standard", "total_max_attempts": settings.max_attempts},
            max_pool_connections=connections,
            # boto3's own CRC trailers are unknown to some stores; Content-MD5 is known to all.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # A proxy from the environment cannot reach this machine's loopback.
            proxies={} if is_loopback(endpoint_url) else None,
        )
        client = session.create_client(
            "s3", endpoint_url=endpoint_url, region_name=settings.region, config=config
        )
        client.meta.events.register("before-call.s3.HeadBucket", _take_as_answered)
        return cast("S3Client", client)
    except ValueError:
        # boto3's own words repeat the URL, which may hold a password.
        where = host_of(endpoint_url)
        raise StorageUnavailable(
            f"{where} is no S3 endpoint.",
            field="storage.endpoint_url",
            value=where,
            allowed="a URL such as http://127.0.0.1:8333; absent means AWS",
        ) from None


def _take_as_answered(params: dict[str, Any], **_: Any) -> None:
    """Let no redirect of HeadBucket be followed.

    botocore asks it where a bucket is after any redirect, so that whoever redirects everything, as
    login pages do, would be asked again and again until the stack is full.
    """
    params["context"].setdefault("s3_redirect", {})["redirected"] = True


def _session(settings: StoreConnection) -> botocore.session.Session:
    session = botocore.session.get_session()
    session.register_component("data_loader", _descriptions())
    if settings.credentials_file is None:
        return session
    # This file alone: neither AWS_ACCESS_KEY_ID nor a role in ~/.aws/config may take its place.
    session.set_config_variable("credentials_file", settings.credentials_file)
    session.set_config_variable("config_file", os.devnull)
    session.set_config_variable("profile", "default")
    try:
        session.get_scoped_config()
    except ProfileNotFound:
        raise StorageUnavailable(
            "storage.credentials_file cannot be read, or has no profile [default].",
            field="storage.credentials_file",
            value=settings.credentials_file,
            allowed="an AWS shared-credentials file, the same path on every node; absent for "
            "boto3's usual chain",
        ) from None
    return session


@cache
def _descriptions() -> botocore.loaders.Loader:
    """Return what reads botocore's descriptions of services; each is parsed once a process."""
    return botocore.loaders.create_loader()
