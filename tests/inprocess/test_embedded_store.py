"""The embedded SeaweedFS as a process: it keeps its data, its keys and its promises when killed."""

import asyncio
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from serve.config import StorageSettings
from serve.embedded_store import EmbeddedStore
from serve.errors import ConfigurationError, StorageUnavailable
from serve.loopback_ports import GRPC_OFFSET, free_port, is_free
from serve.storage import ObjectStore

_OWNER = """
import sys, time
from serve.embedded_store import EmbeddedStore
store = EmbeddedStore(sys.argv[1], "pictures")
store.start()
print(store.endpoint_url, flush=True)
time.sleep(600)
"""


def _client(store: EmbeddedStore) -> ObjectStore:
    return ObjectStore(store.storage_settings(StorageSettings()))


def _put(store: EmbeddedStore, key: str, data: bytes) -> None:
    asyncio.run(_client(store).put(key, data, "text/plain"))


def _get(store: EmbeddedStore, key: str) -> bytes | None:
    return asyncio.run(_client(store).get(key))


def _until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def _accepts(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def _processes(data_dir: Path) -> list[int]:
    """Return the ids of the SeaweedFS processes on this folder."""
    found = subprocess.run(
        ["ps", "-axww", "-o", "pid=,command="], capture_output=True, text=True, check=True
    )
    return [
        int(line.split()[0])
        for line in found.stdout.splitlines()
        if re.search(rf"weed mini -dir={re.escape(str(data_dir))}/", line)
        and "store_guard" not in line
    ]


@pytest.fixture
def owner(tmp_path):
    """Another process that runs a store in tmp_path; yields the process and its endpoint."""
    process = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield process, process.stdout.readline().strip()
    process.kill()
    process.wait()
    process.stdout.close()
    _until(lambda: not _processes(tmp_path), "the store outlived its owner")


def test_data_keys_and_urls_survive_a_restart(tmp_path):
    with EmbeddedStore(tmp_path, "pictures") as store:
        _put(store, "a", b"kept")
        url, endpoint = _client(store).presign("a"), store.endpoint_url
        credentials = store.credentials_file.read_text()
        assert httpx.get(url).content == b"kept"
    assert not _processes(tmp_path)
    with EmbeddedStore(tmp_path, "pictures") as store:
        assert store.endpoint_url == endpoint
        assert store.credentials_file.read_text() == credentials
        assert httpx.get(url).content == b"kept"


def test_data_survives_other_ports(tmp_path):
    with EmbeddedStore(tmp_path, "pictures") as store:
        _put(store, "a", b"kept" * 1000)
        ports = [*store._ports.values(), *(port + GRPC_OFFSET for port in store._ports.values())]
    busy = [socket.create_server(("127.0.0.1", port)) for port in ports]
    try:
        with EmbeddedStore(tmp_path, "pictures") as store:
            assert urlsplit(store.endpoint_url).port not in ports
            assert _get(store, "a") == b"kept" * 1000
            _put(store, "b", b"new")
            assert _get(store, "b") == b"new"
    finally:
        for server in busy:
            server.close()


def test_another_bucket_is_created(tmp_path):
    with EmbeddedStore(tmp_path, "pictures"):
        pass
    with EmbeddedStore(tmp_path, "another") as store:
        _put(store, "a", b"1")


def test_a_store_that_is_killed_comes_back_with_its_data(tmp_path):
    with EmbeddedStore(tmp_path, "pictures") as store:
        _put(store, "a", b"kept")
        [before] = _processes(tmp_path)
        os.kill(before, signal.SIGKILL)
        _until(lambda: _processes(tmp_path) not in ([], [before]), "it was not started again")

        def back() -> bool:
            try:
                return _get(store, "a") == b"kept"
            except StorageUnavailable:
                return False

        _until(back, "the data did not come back")
        _put(store, "b", b"new")
    assert not _processes(tmp_path)


def test_store_dies_with_an_owner_that_is_killed_and_its_data_stays(tmp_path, owner):
    process, endpoint = owner
    assert len(_processes(tmp_path)) == 1
    settings = StorageSettings(
        endpoint_url=endpoint,
        bucket="pictures",
        credentials_file=str(tmp_path / "credentials"),
    )
    asyncio.run(ObjectStore(settings).put("a", b"kept", "text/plain"))
    process.kill()
    process.wait()
    # At once: the next owner has to wait for the old store's processes by itself.
    with EmbeddedStore(tmp_path, "pictures") as store:
        assert _get(store, "a") == b"kept"
        assert len(_processes(tmp_path)) == 1
        assert store.endpoint_url == endpoint


@pytest.mark.skipif(sys.platform != "linux", reason="a parent-death signal exists on Linux only")
def test_store_dies_with_its_guard(tmp_path):
    with EmbeddedStore(tmp_path, "pictures") as store:
        assert store._guard is not None
        store._guard.kill()
        store._guard.wait()
        _until(lambda: not _processes(tmp_path), "the store outlived its guard")


def test_interrupt_in_the_terminal_leaves_the_store_to_its_owner(tmp_path):
    with EmbeddedStore(tmp_path, "pictures") as store:
        assert store._guard is not None
        assert os.getpgid(store._guard.pid) != os.getpgid(0)
        assert [os.getpgid(pid) for pid in _processes(tmp_path)] != [os.getpgid(0)]


def test_second_owner_is_told_who_the_first_is(tmp_path, owner):
    process, endpoint = owner
    with pytest.raises(ConfigurationError, match=f"pid {process.pid}") as caught:
        EmbeddedStore(tmp_path, "pictures").start()
    assert caught.value.field == "embedded_store.data_dir"
    assert httpx.get(f"{endpoint}/healthz").status_code == 200


def test_second_store_in_one_process_is_refused(tmp_path):
    with (
        EmbeddedStore(tmp_path, "pictures"),
        pytest.raises(ConfigurationError, match=f"pid {os.getpid()}"),
    ):
        EmbeddedStore(tmp_path, "pictures").start()


def test_several_stores_run_side_by_side(tmp_path):
    with (
        EmbeddedStore(tmp_path / "1", "pictures") as one,
        EmbeddedStore(tmp_path / "2", "pictures") as two,
    ):
        _put(one, "a", b"1")
        _put(two, "a", b"2")
        assert _get(one, "a") == b"1"
        assert one.credentials_file.read_text() != two.credentials_file.read_text()


def test_only_loopback_listens(tmp_path):
    with EmbeddedStore(tmp_path, "pictures") as store:
        assert store.endpoint_url.startswith("http://127.0.0.1:")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing; says which address this machine has
            address = probe.getsockname()[0]
        if address.startswith("127."):
            pytest.skip("this machine has loopback only")
        ports = [port + offset for port in store._ports.values() for offset in (0, GRPC_OFFSET)]
        # Some of its parts start after the S3 gateway.
        _until(lambda: all(_accepts("127.0.0.1", port) for port in ports), "a part did not start")
        assert not any(_accepts(address, port) for port in ports)


def test_secrets_are_private_and_not_in_the_log(tmp_path):
    folder = tmp_path / "data"
    with EmbeddedStore(folder, "pictures") as store:
        _put(store, "a", b"1")
        for private in (store.credentials_file, folder / "s3.json"):
            assert stat.S_IMODE(private.stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        secret = store.credentials_file.read_text().split("secret_access_key = ")[1].strip()
        assert len(secret) >= 40
        commands = subprocess.run(["ps", "-axww"], capture_output=True, text=True, check=True)
        assert secret not in commands.stdout
    assert secret not in store.log_file.read_text()


def test_stop_twice_and_no_socket_left_behind(tmp_path):
    store = EmbeddedStore(tmp_path, "pictures")
    store.start()
    ports = [*store._ports.values()]
    store.stop()
    store.stop()
    left = {str(port) for port in ports} | {str(port + GRPC_OFFSET) for port in ports}
    assert not [
        path for path in Path("/tmp").glob("seaweedfs-*.sock") if path.stem.split("-")[-1] in left
    ]


def test_store_that_cannot_start_shows_the_end_of_its_log(tmp_path, monkeypatch):
    broken = [sys.executable, "-c", "print('disk on fire'); raise SystemExit(3)"]
    monkeypatch.setattr(EmbeddedStore, "_command", lambda *_: broken)
    with pytest.raises(ConfigurationError, match="disk on fire") as caught:
        EmbeddedStore(tmp_path, "pictures").start()
    assert "code 3" in caught.value.message
    monkeypatch.undo()
    with EmbeddedStore(tmp_path, "pictures"):
        pass  # the failed start gave the folder up


def test_port_taken_in_the_last_moment_is_no_failure(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", free_port(()))) as busy:
        port = busy.getsockname()[1]
        chosen: list[int] = []

        def unlucky(taken):
            chosen.append(port if not chosen else free_port(taken))
            return chosen[-1]

        monkeypatch.setattr("serve.embedded_store.free_port", unlucky)
        with EmbeddedStore(tmp_path, "pictures") as store:
            _put(store, "a", b"1")
        assert port not in store._ports.values()
        assert chosen[0] == port


@pytest.mark.parametrize("content", ["", "not json", "[]", '{"s3": "x"}', '{"s3": 99999999}'])
def test_damaged_port_record_is_ignored(tmp_path, content):
    (tmp_path / "ports.json").write_text(content)
    store = EmbeddedStore(tmp_path, "pictures")
    store._choose_ports(fresh=False)
    assert all(is_free(port) for port in store._ports.values())
    assert len(set(store._ports.values())) == len(store._ports)


def test_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigurationError) as caught:
            EmbeddedStore(folder, "pictures").start()
        assert caught.value.field == "embedded_store.data_dir"
        assert caught.value.value == str(folder)


def test_invalid_bucket_name_is_told(tmp_path):
    with pytest.raises(StorageUnavailable, match="not allowed") as caught:
        EmbeddedStore(tmp_path, "Not_A_Bucket").start()
    assert caught.value.field == "storage.bucket"
    assert not _processes(tmp_path)
