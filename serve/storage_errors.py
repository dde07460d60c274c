"""What an S3 client's failure means for a person: one message and one remedy per cause.

Only error codes, the bucket and the endpoint's host are repeated. A store's own message may quote
a signature or an access key, so it never is.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    InvalidEndpointConfigurationError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ProxyConnectionError,
    ReadTimeoutError,
    SSLError,
    TokenRetrievalError,
)

from serve.errors import StorageUnavailable

_CHAIN = (
    "credentials by boto3's usual chain: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile in "
    "~/.aws/credentials, AWS_SHARED_CREDENTIALS_FILE, or a role of the machine or pod"
)
_ENDPOINT = "a reachable S3 endpoint in storage.endpoint_url (absent means AWS)"
_POLICY = (
    "a policy with s3:GetObject, s3:PutObject and s3:DeleteObject on the bucket's objects and "
    "s3:ListBucket on the bucket; without s3:ListBucket, AWS answers 403 for keys that do not exist"
)

# Code of the store's answer -> (what happened, the remedy). {bucket}, {where} and {region} are
# filled in.
_CODES: dict[str, tuple[str, str]] = {
    "NoSuchBucket": (
        "Bucket {bucket!r} does not exist at {where}.",
        "an existing bucket in storage.bucket; create it with: aws s3 mb s3://{bucket}",
    ),
    "InvalidBucketName": (
        "Bucket name {bucket!r} is not allowed at {where}.",
        "a valid bucket name in storage.bucket: lower-case letters, digits and hyphens",
    ),
    "InvalidAccessKeyId": (
        "The object store at {where} does not know this access key.",
        f"an access key that exists there; {_CHAIN}",
    ),
    "SignatureDoesNotMatch": (
        "The object store at {where} refuses the signature: the secret key is wrong.",
        "the secret key that belongs to the access key; if a proxy stands in between, it must "
        "pass the Host header on",
    ),
    "ExpiredToken": (
        "The temporary credentials for {where} have expired.",
        "fresh credentials: log in again, or let a role provide them",
    ),
    "RequestTimeTooSkewed": (
        "The clock of this machine and the clock of {where} differ too much.",
        "clocks within 15 minutes of each other: synchronise this machine's (NTP)",
    ),
    "AccessDenied": ("Access to bucket {bucket!r} at {where} is denied.", _POLICY),
    "WrongRegion": (
        "Bucket {bucket!r} is not in region {region!r} of {where}.",
        "the bucket's own region in storage.region",
    ),
    "BadDigest": (
        "What arrived at {where} is not what was sent: the checksum differs.",
        "a network path that does not change data; try again",
    ),
    "SlowDown": (
        "The object store at {where} asks for fewer requests.",
        "fewer requests at once, or a larger storage.max_attempts",
    ),
    "NotImplemented": (
        "The object store at {where} does not support an operation that Kelvin needs.",
        "a store with conditional writes: AWS S3, MinIO, SeaweedFS, R2; see kelvin doctor",
    ),
    "InsufficientStorage": (
        "The object store at {where} has no space left.",
        "free space on the store's disks, or a larger quota",
    ),
}
_SAME_AS = {
    "InvalidToken": "ExpiredToken",
    "TokenRefreshRequired": "ExpiredToken",
    "RequestExpired": "RequestTimeTooSkewed",
    "AllAccessDisabled": "AccessDenied",
    "AccountProblem": "AccessDenied",
    "Forbidden": "AccessDenied",
    "403": "AccessDenied",
    "404": "NoSuchBucket",
    "301": "WrongRegion",
    "PermanentRedirect": "WrongRegion",
    "AuthorizationHeaderMalformed": "WrongRegion",
    "IllegalLocationConstraintException": "WrongRegion",
    "InvalidDigest": "BadDigest",
    "XAmzContentSHA256Mismatch": "BadDigest",
    "503": "SlowDown",
    "ServiceUnavailable": "SlowDown",
    "Throttling": "SlowDown",
    "501": "NotImplemented",
    "507": "InsufficientStorage",
    "XMinioStorageFull": "InsufficientStorage",
    "QuotaExceeded": "InsufficientStorage",
}


# What fresh credentials may mend.
_CREDENTIALS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "AccessDenied")


def host_of(endpoint_url: str | None) -> str:
    """Return scheme, host and port of an endpoint, without any user name or password in it."""
    if endpoint_url is None:
        return "AWS S3"
    try:
        parts = urlsplit(endpoint_url)
        host, port = parts.hostname or "?", parts.port
    except ValueError:
        return "an endpoint that is not a URL"
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}" + (f":{port}" if port else "")


def shown_endpoint(endpoint_url: str | None) -> str | None:
    """Return the endpoint as callers may see it; None for AWS."""
    return None if endpoint_url is None else host_of(endpoint_url)


def error_code(error: ClientError) -> str:
    """Return the store's error code, or the HTTP status where the answer had no body."""
    return str(error.response.get("Error", {}).get("Code", "Unknown"))


def is_about_credentials(error: BotoCoreError | ClientError) -> bool:
    """Return whether other credentials might get another answer."""
    if isinstance(error, ClientError):
        code = error_code(error)
        return _SAME_AS.get(code, code) in _CREDENTIALS
    return isinstance(error, NoCredentialsError | PartialCredentialsError | TokenRetrievalError)


def explain(
    error: BotoCoreError | ClientError, *, bucket: str, endpoint_url: str | None, region: str
) -> StorageUnavailable:
    """Translate a failure of boto3.

    Returns:
        The typed error: `field` is the setting to look at, `allowed` what to do. No credential,
        signature or text of the store is in it.
    """
    where = host_of(endpoint_url)
    if isinstance(error, ClientError):
        code = error_code(error)
        known = _CODES.get(_SAME_AS.get(code, code))
        if known is None:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", "no status")
            message = f"The object store at {where} answered {_plain(code)} ({status})."
            remedy = "a store that accepts this; kelvin doctor tries each operation by itself"
        else:
            message = known[0].format(bucket=bucket, where=where, region=region)
            remedy = known[1].format(bucket=bucket)
        return StorageUnavailable(message, field="storage.bucket", value=bucket, allowed=remedy)
    message, remedy = _transport(error, where)
    return StorageUnavailable(message, field="storage.endpoint_url", value=where, allowed=remedy)


def _transport(error: BotoCoreError, where: str) -> tuple[str, str]:
    """Return message and remedy for a call that never got an answer."""
    if isinstance(error, NoCredentialsError):
        return f"There are no credentials for {where}.", _CHAIN
    if isinstance(error, PartialCredentialsError):
        return f"Half of the credentials for {where} are missing.", _CHAIN
    if isinstance(error, ProfileNotFound):
        return "The AWS profile that AWS_PROFILE names does not exist.", _CHAIN
    if isinstance(error, TokenRetrievalError):
        return f"A login token for {where} cannot be had.", "a fresh login: aws sso login"
    if isinstance(error, ConnectTimeoutError):
        return (
            f"Connecting to {where} takes too long.",
            f"{_ENDPOINT}; a firewall may drop packets; storage.connect_timeout_s",
        )
    if isinstance(error, ReadTimeoutError):
        return (
            f"{where} accepted the connection but did not answer in time.",
            "an object store that is up; storage.read_timeout_s if it is only slow",
        )
    if isinstance(error, SSLError):
        return (
            f"The TLS connection to {where} failed.",
            "a certificate this machine trusts (AWS_CA_BUNDLE), or http:// if it has no TLS",
        )
    if isinstance(error, ProxyConnectionError):
        return (
            f"The proxy on the way to {where} cannot be reached.",
            "a working HTTPS_PROXY, or the store's host in NO_PROXY",
        )
    if isinstance(error, EndpointConnectionError):
        return f"{where} cannot be reached: connection refused or unknown host.", _ENDPOINT
    if isinstance(error, ConnectionClosedError):
        return f"{where} closed the connection.", _ENDPOINT
    if isinstance(error, InvalidEndpointConfigurationError):
        return f"{where} is no S3 endpoint.", _ENDPOINT
    if isinstance(error, HTTPClientError):
        return f"The connection to {where} failed ({type(error).__name__}).", _ENDPOINT
    return f"The S3 client for {where} failed ({type(error).__name__}).", "see kelvin doctor"


def _plain(code: str) -> str:
    """Return an error code only if it looks like one: it comes from the other side."""
    return code if code.isalnum() and len(code) <= 64 else "an error"
