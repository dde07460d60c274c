"""Each way a store can fail: a typed error that says which, what to do, and no secret."""

import pickle
import socket
import urllib.parse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from serve import storage as storage_module
from serve.config import StorageSettings
from serve.errors import StorageUnavailable
from serve.storage import ObjectStore
from serve.storage_probe import probe
from tests.inprocess.faulty_server import (
    answering,
    ignoring_conditions,
    losing_first_answers,
    read_message,
    serving,
    silent,
)

_SECRET = "wJalrXUtnFEMI-very-secret"
_ACCESS = "AKIAIOSFODNN7EXAMPLE"


def _credentials(tmp_path, access: str = _ACCESS, secret: str = _SECRET) -> str:
    file = tmp_path / "credentials"
    file.write_text(f"[default]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n")
    return str(file)


async def _failure(settings: StorageSettings) -> dict[str, Any]:
    """Try every method; each must fail alike. Return what is shown."""
    store = ObjectStore(settings)
    errors = []
    for call in (
        lambda: store.put("x", b"1", "text/plain"),
        lambda: store.put("x", b"1", "text/plain", if_absent=True),
        lambda: store.get("x"),
        lambda: store.exists("x"),
        lambda: store.list_keys(""),
        lambda: store.delete("x"),
    ):
        with pytest.raises(StorageUnavailable) as caught:
            await call()
        errors.append(caught.value)
    checks = await probe(store.settings)
    store.close()
    assert [check.ok for check in checks] == [False]
    assert checks[0].detail == errors[0].message
    assert checks[0].remedy
    assert len({error.message for error in errors}) == 1
    error = errors[0]
    assert error.allowed
    assert error.status == 503
    for text in (str(error), str(error.body()), repr(error), str(checks), str(error.__cause__)):
        assert _SECRET not in text
        assert _ACCESS not in text
    assert pickle.loads(pickle.dumps(error)).body() == error.body()
    shown: dict[str, Any] = error.body()["error"]
    return shown


async def test_bucket_missing(storage):
    error = await _failure(storage.model_copy(update={"bucket": "not-there"}))
    assert "'not-there' does not exist" in error["message"]
    assert "aws s3 mb s3://not-there" in error["allowed"]
    assert error["field"] == "storage.bucket"


async def test_unknown_access_key(storage, tmp_path):
    error = await _failure(storage.model_copy(update={"credentials_file": _credentials(tmp_path)}))
    assert "does not know this access key" in error["message"]


async def test_wrong_secret(storage, tmp_path):
    with open(storage.credentials_file) as file:
        access = next(line.split(" = ")[1].strip() for line in file if "access_key_id" in line)
    error = await _failure(
        storage.model_copy(update={"credentials_file": _credentials(tmp_path, access)})
    )
    assert "the secret key is wrong" in error["message"]


async def test_credentials_that_expired_are_read_again(
    storage: StorageSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage_module, "_BETWEEN_CREDENTIALS_S", 0.0)
    file = Path(_credentials(tmp_path))
    store = ObjectStore(storage.model_copy(update={"credentials_file": str(file)}))
    with pytest.raises(StorageUnavailable):
        await store.put("x", b"1", "text/plain")
    assert storage.credentials_file is not None
    file.write_text(Path(storage.credentials_file).read_text())
    assert await store.put("x", b"1", "text/plain")
    store.close()


async def test_no_credentials(storage):
    error = await _failure(storage.model_copy(update={"credentials_file": None}))
    assert "no credentials" in error["message"]
    assert "AWS_ACCESS_KEY_ID" in error["allowed"]


async def test_half_of_the_credentials(storage, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", _ACCESS)
    error = await _failure(storage.model_copy(update={"credentials_file": None}))
    assert "Half of the credentials" in error["message"]


async def test_profile_missing(storage, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "not-there")
    error = await _failure(storage.model_copy(update={"credentials_file": None}))
    assert "AWS_PROFILE" in error["message"]


async def test_credentials_file_missing(storage, tmp_path):
    error = await _failure(
        storage.model_copy(update={"credentials_file": str(tmp_path / "not-there")})
    )
    assert "credentials_file" in error["message"]


async def test_nobody_listens(storage):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    error = await _failure(
        storage.model_copy(update={"endpoint_url": f"http://127.0.0.1:{port}", "max_attempts": 2})
    )
    assert f"http://127.0.0.1:{port} cannot be reached" in error["message"]
    assert error["field"] == "storage.endpoint_url"


async def test_unknown_host(storage):
    error = await _failure(
        storage.model_copy(update={"endpoint_url": "http://store.invalid:9000", "max_attempts": 1})
    )
    assert "http://store.invalid:9000 cannot be reached" in error["message"]


async def test_store_does_not_answer(storage):
    with serving(silent) as url:
        error = await _failure(
            storage.model_copy(
                update={"endpoint_url": url, "read_timeout_s": 0.2, "max_attempts": 1}
            )
        )
    assert "did not answer in time" in error["message"]
    assert "storage.read_timeout_s" in error["allowed"]


async def test_connecting_takes_too_long(storage):
    # A full backlog: the kernel drops further connection attempts, as a firewall would.
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        error = await _failure(
            storage.model_copy(
                update={"endpoint_url": url, "connect_timeout_s": 0.3, "max_attempts": 1}
            )
        )
    assert "Connecting to" in error["message"]
    assert "firewall" in error["allowed"]


async def test_plain_http_where_tls_is_expected(storage):
    secure = storage.endpoint_url.replace("http://", "https://")
    error = await _failure(storage.model_copy(update={"endpoint_url": secure, "max_attempts": 1}))
    assert "TLS" in error["message"]


async def test_clock_of_this_machine_is_wrong(storage, shift_clock):
    shift_clock(24)
    error = await _failure(storage)
    assert "clock" in error["message"]
    assert "NTP" in error["allowed"]


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (403, "AccessDenied", "denied"),
        (400, "AuthorizationHeaderMalformed", "not in region"),
        (403, "ExpiredToken", "expired"),
        (503, "SlowDown", "fewer requests"),
        (507, "XMinioStorageFull", "no space left"),
        (501, "NotImplemented", "does not support"),
        (500, "InternalError", "answered InternalError (500)"),
        (400, "</Code><b>" + _SECRET, "answered"),
    ],
)
async def test_store_answers_with_an_error(storage, status, code, says):
    body = f"<Error><Code>{code}</Code><Message>key {_ACCESS} {_SECRET}</Message></Error>"
    with serving(answering(status, body, "Content-Type: application/xml\r\n")) as url:
        error = await _failure(storage.model_copy(update={"endpoint_url": url, "max_attempts": 1}))
    assert says in error["message"]


async def test_not_an_s3_store(storage):
    with serving(answering(200, "<html>hello</html>")) as url:
        checks = await probe(storage.model_copy(update={"endpoint_url": url}))
    assert not checks[-1].ok


@pytest.mark.parametrize("body", ["<html>Log in</html>", "", "<Error><Code>Busy</Code></Error>"])
async def test_who_answers_200_to_everything_has_stored_nothing_and_knows_nothing(storage, body):
    with serving(answering(200, body)) as url:
        store = ObjectStore(storage.model_copy(update={"endpoint_url": url, "max_attempts": 1}))
        for call in (
            lambda: store.put("x", b"1", "text/plain"),
            lambda: store.put("x", b"1", "text/plain", if_absent=True),
            lambda: store.swap("x", b"1", "text/plain", '"etag"'),
            lambda: store.get("x"),
            lambda: store.exists("x"),
            lambda: store.list_keys("pending/"),
            lambda: store.list_some("pending/", "", 5),
        ):
            with pytest.raises(StorageUnavailable):
                await call()
        store.close()


@pytest.mark.parametrize(
    "entry",
    ["<Key>a</Key><LastModified>yesterday</LastModified>", "<Key>a</Key><Size>big</Size>", ""],
)
async def test_a_listing_that_makes_no_sense_is_no_stores(storage, entry):
    body = f"<ListBucketResult><Name>kelvin</Name><Contents>{entry}</Contents></ListBucketResult>"
    with serving(answering(200, body)) as url:
        store = ObjectStore(storage.model_copy(update={"endpoint_url": url, "max_attempts": 1}))
        with pytest.raises(StorageUnavailable, match="not as an object store"):
            await store.list_keys("pending/")
        with pytest.raises(StorageUnavailable, match="not as an object store"):
            await store.list_some("pending/", "", 5)
        store.close()


async def test_an_object_of_no_length_that_is_a_number_is_no_stores(storage):
    def handle(connection: socket.socket, _: int) -> None:
        read_message(connection)
        connection.sendall(b'HTTP/1.1 200 OK\r\nETag: "x"\r\nContent-Length: abc\r\n\r\n{}')
        connection.close()

    with serving(handle) as url:
        store = ObjectStore(storage.model_copy(update={"endpoint_url": url, "max_attempts": 1}))
        with pytest.raises(StorageUnavailable, match="not as an object store"):
            await store.get("x")
        with pytest.raises(ValueError, match="malformed key"):
            await store.get("../x")
        store.close()


async def test_who_redirects_everything_is_asked_once(storage):
    # A login page. botocore would look for the bucket's region behind each redirect.
    asked = 0

    def handle(connection: socket.socket, number: int) -> None:
        nonlocal asked
        asked = number + 1
        answering(302, "<html>Log in</html>", "Location: /login\r\n")(connection, number)

    with serving(handle) as url:
        store = ObjectStore(storage.model_copy(update={"endpoint_url": url, "max_attempts": 1}))
        with pytest.raises(StorageUnavailable, match="302"):
            await store.put("x", b"1", "text/plain")
        store.close()
    assert asked <= 3


@pytest.mark.parametrize("url", ["not a url", "http://", "http://[::1", "http://a:b"])
async def test_malformed_endpoint(storage, url):
    error = await _failure(storage.model_copy(update={"endpoint_url": url, "max_attempts": 1}))
    assert error["field"] == "storage.endpoint_url"


async def test_password_in_the_endpoint_is_not_shown(storage):
    url = f"http://{_ACCESS}:{urllib.parse.quote(_SECRET)}@127.0.0.1:9"
    await _failure(storage.model_copy(update={"endpoint_url": url, "max_attempts": 1}))


async def test_store_that_ignores_conditions_is_found_out(storage):
    with serving(ignoring_conditions()) as url:
        checks = await probe(storage.model_copy(update={"endpoint_url": url, "prefix": ""}))
    assert checks[-1].name == "s3_conditional_put"
    assert not checks[-1].ok
    assert "published twice" in checks[-1].detail
    assert "journal.storage" in str(checks[-1].remedy)


async def test_retry_of_a_write_that_had_arrived_is_no_lost_race(storage):
    direct = ObjectStore(storage)
    with serving(losing_first_answers(storage.endpoint_url, 1)) as url:
        shaky = ObjectStore(storage.model_copy(update={"endpoint_url": url}))
        assert await shaky.put("result", b"mine", "text/plain", if_absent=True)
        assert await direct.get("result") == b"mine"


async def test_retry_after_a_race_that_was_lost_is_lost(storage):
    direct = ObjectStore(storage)
    await direct.put("result", b"theirs", "text/plain")
    with serving(losing_first_answers(storage.endpoint_url, 1)) as url:
        shaky = ObjectStore(storage.model_copy(update={"endpoint_url": url}))
        assert not await shaky.put("result", b"mine", "text/plain", if_absent=True)
    assert await direct.get("result") == b"theirs"


async def test_lost_answers_are_retried(storage):
    await ObjectStore(storage).put("x", b"1", "text/plain")
    with serving(losing_first_answers(storage.endpoint_url, 2)) as url:
        assert await ObjectStore(storage.model_copy(update={"endpoint_url": url})).get("x") == b"1"


async def test_conflict_is_tried_again(storage):
    # AWS answers 409 while another conditional write of the key is in flight.
    conflict = "<Error><Code>ConditionalRequestConflict</Code></Error>"
    direct = losing_first_answers(storage.endpoint_url, 0)

    def handle(connection: socket.socket, number: int) -> None:
        (answering(409, conflict) if number == 0 else direct)(connection, number)

    with serving(handle) as url:
        store = ObjectStore(storage.model_copy(update={"endpoint_url": url}))
        assert await store.put("x", b"1", "text/plain", if_absent=True)
        assert not await store.put("x", b"2", "text/plain", if_absent=True)
