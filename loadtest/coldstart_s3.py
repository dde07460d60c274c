"""A model's files from an S3 store to a cold node: Kelvin's cache beside boto3's own transfer.

The store is a real SeaweedFS on this machine, whose page cache holds the files; both arms read the
same objects over as many connections, in turns whose order is reversed each time, into files that
are not there. Kelvin's figure has all that a replica waits for: the listing, the sums of every byte
against those the store keeps, the locks. boto3 checks nothing of what it reads in ranges.

Then replicas in processes of their own: two that start together on a cold node, and one that starts
when the files are there. What they download is counted on the loopback interface.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from s3transfer.manager import TransferConfig, TransferManager

from loadtest.results import Results
from serve.embedded_store import EmbeddedStore
from serve.model_cache.node_copy import on_this_node
from serve.model_settings import ModelSettings
from serve.model_source_settings import ModelSourceSettings
from serve.storage_settings import StorageSettings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

LEAST_RATE = 0.80  # of boto3's
MOST_AGAIN = 0.02  # of a download's bytes: listings and other traffic of this machine
_GIB = 1 << 30
_BUCKET, _PREFIX = "models", "sd35/large"
_INDEX = b'{"transformer": ["", ""], "text_encoder_3": ["", ""], "vae": ["", ""]}'
_SHARES = {"transformer/diffusion_pytorch_model": 0.60, "text_encoder_3/model": 0.37}
_REPLICA = """
import sys
from serve.model_cache.node_copy import on_this_node
from serve.model_settings import ModelSettings
print(on_this_node(ModelSettings.model_validate_json(sys.argv[1])).path)
"""


class _Arms:
    """Both ways to the files of one store.

    Args:
        storage: Of the store.
        folder: For what is downloaded; emptied each time.
    """

    def __init__(self, storage: StorageSettings, folder: Path) -> None:
        self._storage = storage
        self._folder = folder
        os.environ["AWS_SHARED_CREDENTIALS_FILE"] = storage.credentials_file or os.devnull
        session = boto3.Session(profile_name="default")
        self.client: S3Client = session.client(
            "s3", endpoint_url=storage.endpoint_url, region_name=storage.region
        )
        self.keys: list[str] = []

    def settings(self) -> ModelSettings:
        """Return a node's settings, with its cache in the folder."""
        source = ModelSourceSettings(
            endpoint_url=self._storage.endpoint_url,
            credentials_file=self._storage.credentials_file,
            cache_dir=str(self._folder / "cache"),
        )
        return ModelSettings(path=f"s3://{_BUCKET}/{_PREFIX}", source=source)

    def upload(self, path: str, data_file: Path) -> None:
        """Put a file as boto3 does: in parts of 8 MiB, each with a CRC-32."""
        self.keys.append(f"{_PREFIX}/{path}")
        self.client.upload_file(str(data_file), _BUCKET, self.keys[-1])

    def boto3(self) -> None:
        """Download everything by boto3's own transfer, all files at once."""
        config = TransferConfig(max_request_concurrency=ModelSourceSettings().connections)
        with TransferManager(self.client, config) as manager:
            futures = [
                manager.download(_BUCKET, key, str(self._folder / key.replace("/", "_")))
                for key in self.keys
            ]
            for each in futures:
                each.result()

    def kelvin(self) -> None:
        """Bring the model to a cold node."""
        on_this_node(self.settings())

    def seconds(self, download: Callable[[], None]) -> float:
        """Return what a download into an empty folder takes."""
        self.forget()
        began = time.perf_counter()
        download()
        return time.perf_counter() - began

    def forget(self) -> None:
        """Make the node cold."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        os.sync()  # what is left to write of one turn is no burden of the next


def measure(gib: float, rounds: int, results: Results) -> None:
    """Measure both arms, then replicas; `targets` of the report says what is met.

    Args:
        gib: Of all files together.
        rounds: Turns of each arm.
        results: Where figures go.
    """
    with tempfile.TemporaryDirectory(prefix="kelvin-coldstart-") as work:
        root = Path(work)
        with EmbeddedStore(root / "store", _BUCKET) as store:
            arms = _Arms(store.storage_settings(StorageSettings()), root / "node")
            total = _upload(arms, root, int(gib * _GIB))
            results.keep(files=len(arms.keys), gib=round(total / _GIB, 3))
            _compare(arms, rounds, total, results)
            _replicas(arms, total, results)


def _compare(arms: _Arms, rounds: int, total: int, results: Results) -> None:
    order = [("boto3", arms.boto3), ("kelvin", arms.kelvin)]
    took: dict[str, list[float]] = {"boto3": [], "kelvin": []}
    for _, download in order:
        arms.seconds(download)  # the first makes clients and reads what they are described by
    for _ in range(rounds):
        for name, download in order:
            took[name].append(round(arms.seconds(download), 3))
        order.reverse()
    for name, seconds in took.items():
        rate = total / _GIB / statistics.median(seconds)
        results.keep_part("download", name, {"seconds": seconds, "gib_per_s": round(rate, 3)})
    ratios = [theirs / ours for theirs, ours in zip(took["boto3"], took["kelvin"], strict=True)]
    ratio = round(statistics.median(ratios), 3)
    found = {"at_least": LEAST_RATE, "is": ratio, "met": ratio >= LEAST_RATE}
    results.keep(ratios=[round(each, 3) for each in ratios])
    results.keep_part("targets", "download over boto3's", found)


def _replicas(arms: _Arms, total: int, results: Results) -> None:
    command = [sys.executable, "-c", _REPLICA, arms.settings().model_dump_json()]

    def came(number: int) -> int:
        before = _loopback_bytes()
        replicas = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(number)]
        folders = {each.communicate()[0] for each in replicas}
        if len(folders) != 1 or any(each.returncode for each in replicas):
            raise RuntimeError("a replica did not get the model's folder")
        return _loopback_bytes() - before

    arms.forget()
    alone = came(1)  # more than the files, for parts of SeaweedFS speak by loopback, too
    results.keep(loopback_bytes_of_one_download_over_the_files=round(alone / total, 3))
    arms.forget()
    for name, number, most in (
        ("two replicas at once", 2, 1 + MOST_AGAIN),
        ("one more", 1, MOST_AGAIN),
    ):
        share = round(came(number) / alone, 4)
        found = {"at_most": most, "is": share, "met": share <= most}
        results.keep_part("targets", f"bytes that came for {name}, over one download's", found)


def _upload(arms: _Arms, root: Path, wanted: int) -> int:
    """Fill the store; return the bytes of all files."""
    draw = random.Random("model")
    sizes = {f"{path}.safetensors": int(share * wanted) for path, share in _SHARES.items()}
    sizes["vae/diffusion_pytorch_model.safetensors"] = wanted - sum(sizes.values())
    written = root / "written"
    for path, size in sizes.items():
        with written.open("wb") as file:
            for begin in range(0, size, 1 << 20):
                file.write(draw.randbytes(min(1 << 20, size - begin)))
        arms.upload(path, written)
    written.write_bytes(_INDEX)
    arms.upload("model_index.json", written)
    written.unlink()
    return sum(sizes.values()) + len(_INDEX)


def _loopback_bytes() -> int:
    """Return what this machine has sent to itself (Linux, /proc/net/dev)."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[0])
    raise OSError("/proc/net/dev has no lo")
