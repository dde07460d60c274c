"""A model in a real S3 store, and settings of a node that takes it from there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deployments.builtin.pico import write_pico
from serve.config import StorageSettings
from serve.model_cache.checksums import PartDigests
from serve.model_settings import ModelSettings
from serve.model_source_settings import ModelSourceSettings
from serve.s3_client import s3_client

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PART_BYTES = 5 << 20  # the least that S3 allows
RUN = """
import json, logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
logging.getLogger("botocore").setLevel(logging.WARNING)
from serve.model_cache.checksums import PartDigests
from serve.model_cache.node_copy import on_this_node
from serve.model_settings import ModelSettings
print(on_this_node(ModelSettings(**json.loads(sys.argv[1]))).path)
"""


class Remote:
    """A prefix of the store with a model, and settings of a node that reads it."""

    def __init__(self, s3: StorageSettings, prefix: str, cache: Path) -> None:
        self.bucket = s3.bucket
        self.prefix = prefix.strip("/")
        self.client: S3Client = s3_client(s3, s3.endpoint_url, connections=4)
        self._s3 = s3
        self._cache = cache

    def put(self, path: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}", Body=data)

    def put_in_parts(self, path: str, data: bytes) -> None:
        # Any, for types of the client know no dictionary of arguments.
        where: Any = {"Bucket": self.bucket, "Key": f"{self.prefix}/{path}"}
        upload = self.client.create_multipart_upload(**where)["UploadId"]
        parts: list[Any] = []
        for number, begin in enumerate(range(0, len(data), PART_BYTES), 1):
            body = data[begin : begin + PART_BYTES]
            told = self.client.upload_part(**where, UploadId=upload, PartNumber=number, Body=body)
            parts.append({"PartNumber": number, "ETag": told["ETag"]})
        self.client.complete_multipart_upload(
            **where, UploadId=upload, MultipartUpload={"Parts": parts}
        )

    def settings(self, path: str = "", **source: Any) -> ModelSettings:
        about = {
            "endpoint_url": self._s3.endpoint_url,
            "credentials_file": self._s3.credentials_file,
            "cache_dir": str(self._cache),
            "max_attempts": 1,
        }
        address = "/".join(filter(None, (f"s3://{self.bucket}/{self.prefix}", path)))
        return ModelSettings(path=address, source=ModelSourceSettings(**{**about, **source}))

    def elsewhere(self, settings: ModelSettings) -> subprocess.Popen[str]:
        """Return another process of the node that takes the model."""
        return subprocess.Popen(
            [sys.executable, "-c", RUN, settings.model_dump_json()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def uploaded_pico(remote: Remote, folder: Path) -> Path:
    """Pico as it was written to a folder and uploaded, with what nobody should want."""
    write_pico(folder, seed=0)
    for file in folder.rglob("*"):
        if file.is_file():
            remote.put(str(file.relative_to(folder)), file.read_bytes())
    remote.put("transformer/diffusion_pytorch_model.bin", b"a pickle")
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def change_every_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the network changed a byte of every piece that comes."""
    take = PartDigests.take

    def take_changed(digests: PartDigests, piece: memoryview) -> None:
        take(digests, memoryview(bytes([piece[0] ^ 1]) + bytes(piece[1:])))

    monkeypatch.setattr(PartDigests, "take", take_changed)
