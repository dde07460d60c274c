"""The HTTP client against a small real server: what it promises when things go wrong.

A real socket rather than a mocked transport, because broken streams are what it exists for.
"""

import json
import math
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from serve import errors
from serve.__main__ import main
from serve.client import Kelvin
from serve.client_errors import PictureCorrupt, ServerUnreachable, UnexpectedAnswer
from serve.keys import new_key
from serve.requests import GenerateRequest, JobEvent
from tests.unit.fake_kelvin import (
    JOB,
    PICTURE,
    FakeKelvin,
    accept,
    image,
    sends,
    served,
    step,
    stored,
    streams,
)

kelvin = pytest.fixture(served)


@pytest.fixture
def client(kelvin: FakeKelvin) -> Iterator[Kelvin]:
    with Kelvin(kelvin.url, timeout_s=20, first_pause_s=0.001) as opened:
        yield opened


@pytest.fixture
def unused_url() -> Iterator[str]:
    # Bound and not listening: nobody answers, and nobody else can take the port meanwhile.
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{holder.getsockname()[1]}"


def test_generate_posts_the_request_and_reports_every_event(
    kelvin: FakeKelvin, client: Kelvin
) -> None:
    accept(kelvin)
    last = stored(kelvin)
    kelvin.on("GET", f"/v1/jobs/{JOB}/events", streams(step(1), step(2), step(3), last))
    events: list[JobEvent] = []
    result = client.generate(GenerateRequest(prompt="a circle", seed=1), events.append)
    assert result == last.result
    assert [event.step for event in events] == [1, 2, 3, None]
    assert GenerateRequest.model_validate_json(kelvin.seen[0][2]) == result.request


def test_a_broken_stream_is_opened_again(kelvin: FakeKelvin, client: Kelvin) -> None:
    accept(kelvin)
    kelvin.on(
        "GET",
        f"/v1/jobs/{JOB}/events",
        streams(step(1), breaks=True),
        streams(step(2)),
        streams(step(3), stored(kelvin)),
    )
    assert client.generate(GenerateRequest(prompt="a circle")).id == JOB


def test_a_stream_that_only_ever_ends_is_given_up(kelvin: FakeKelvin, client: Kelvin) -> None:
    kelvin.on("GET", f"/v1/jobs/{JOB}/events", streams())
    with pytest.raises(UnexpectedAnswer, match="keeps ending"):
        list(client.events(JOB))


@pytest.mark.parametrize("breaks", [True, False])
def test_a_stream_that_only_repeats_its_beginning_is_given_up(
    kelvin: FakeKelvin, client: Kelvin, breaks: bool
) -> None:
    queued = JobEvent(event="queued", id=JOB)
    kelvin.on("GET", f"/v1/jobs/{JOB}/events", streams(queued, breaks=breaks))
    with pytest.raises(ServerUnreachable if breaks else UnexpectedAnswer):
        list(client.events(JOB))


def test_a_stream_that_gets_further_each_time_is_not_given_up(
    kelvin: FakeKelvin, client: Kelvin
) -> None:
    steps = [step(number) for number in range(12)]
    growing = [streams(*steps[:length], breaks=True) for length in range(1, 12)]
    kelvin.on("GET", f"/v1/jobs/{JOB}/events", *growing, streams(*steps, stored(kelvin)))
    assert list(client.events(JOB))[-1].event == "stored"


def test_a_refusal_by_the_proxy_is_told_as_overload(kelvin: FakeKelvin, client: Kelvin) -> None:
    kelvin.on("POST", "/v1/jobs", sends(429, b"Request dropped", "text/plain"))
    with pytest.raises(errors.Overloaded):
        client.submit(GenerateRequest(prompt="a circle"))


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequest("no", field="width", value=17, allowed="a multiple of 16"),
        errors.NotSupportedYet("not yet", field="loras"),
        errors.PayloadTooLarge("big"),
        errors.Overloaded("full"),
        errors.StorageUnavailable("s3 is away", value="kelvin"),
        errors.StageUnavailable("died"),
    ],
)
def test_a_typed_error_arrives_as_it_was_raised(
    kelvin: FakeKelvin, client: Kelvin, error: errors.KelvinError
) -> None:
    kelvin.on("POST", "/v1/jobs", sends(error.status, error.body()))
    with pytest.raises(errors.KelvinError) as raised:
        client.submit(GenerateRequest(prompt="a circle"))
    assert type(raised.value) is type(error)
    assert raised.value.body() == error.body()


def test_a_failed_job_raises_its_error(kelvin: FakeKelvin, client: Kelvin) -> None:
    accept(kelvin)
    body = errors.StageFailed("the decoder broke", field="stage", value="decode").body()
    failed = JobEvent(event="failed", id=JOB, error=body)
    kelvin.on("GET", f"/v1/jobs/{JOB}/events", streams(step(1), failed))
    with pytest.raises(errors.StageFailed, match="the decoder broke"):
        client.generate(GenerateRequest(prompt="a circle"))


def test_a_cancelled_job_says_so(kelvin: FakeKelvin, client: Kelvin) -> None:
    accept(kelvin)
    kelvin.on("GET", f"/v1/jobs/{JOB}/events", streams(JobEvent(event="cancelled", id=JOB)))
    with pytest.raises(errors.JobCancelled):
        client.generate(GenerateRequest(prompt="a circle"))


def test_whoever_stops_waiting_cancels_the_job(kelvin: FakeKelvin, client: Kelvin) -> None:
    accept(kelvin)
    kelvin.on("GET", f"/v1/jobs/{JOB}/events", streams(step(1), stored(kelvin)))

    def impatient(_: JobEvent) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.generate(GenerateRequest(prompt="a circle"), impatient)
    assert ("DELETE", f"/v1/jobs/{JOB}", b"") in kelvin.seen


def test_a_picture_is_checked_against_its_sha256(kelvin: FakeKelvin, client: Kelvin) -> None:
    path = "/picture?signature=secret"
    kelvin.on("GET", path, sends(200, PICTURE, "image/png"), sends(200, b"x", "image/png"))
    assert client.download(image(kelvin)) == PICTURE
    with pytest.raises(PictureCorrupt):
        client.download(image(kelvin))


def test_an_expired_url_is_a_typed_error_without_its_signature(
    kelvin: FakeKelvin, client: Kelvin
) -> None:
    kelvin.on("GET", "/picture?signature=secret", sends(403, b"<Error/>", "application/xml"))
    with pytest.raises(errors.StorageUnavailable, match="403") as raised:
        client.download(image(kelvin))
    assert "secret" not in json.dumps(raised.value.body())


@pytest.mark.parametrize("answer", [sends(502, b"<html>", "text/html"), sends(404, {"detail": 1})])
def test_something_else_on_the_port_is_said(
    kelvin: FakeKelvin, client: Kelvin, answer: Callable[[Any], None]
) -> None:
    kelvin.on("POST", "/v1/jobs", answer)
    with pytest.raises(UnexpectedAnswer):
        client.submit(GenerateRequest(prompt="a circle"))


def test_an_answer_of_another_shape_is_said(kelvin: FakeKelvin, client: Kelvin) -> None:
    kelvin.on("GET", f"/v1/jobs/{JOB}", sends(200, {"id": JOB, "status": "levitating"}))
    with pytest.raises(UnexpectedAnswer, match="version"):
        client.job(JOB)


@pytest.mark.parametrize("body", [b"<html>a web server</html>", [1], {"models": [1, None]}, {}])
def test_something_else_at_the_url_is_said_of_its_models(
    kelvin: FakeKelvin, client: Kelvin, body: Any
) -> None:
    kelvin.on("GET", "/v1/models", sends(200, body))
    with pytest.raises(UnexpectedAnswer):
        client.models()


def test_no_server_teaches_kelvin_up(unused_url: str) -> None:
    with Kelvin(unused_url) as client, pytest.raises(ServerUnreachable) as raised:
        client.submit(GenerateRequest(prompt="a circle"))
    assert raised.value.field == "url"
    assert "kelvin up" in str(raised.value.allowed)


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://x", "http://", "/v1", "http://a:9 x", "http://[::1"]
)
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(errors.InvalidRequest) as raised:
        Kelvin(url)
    assert raised.value.field == "url"


def test_a_proxy_in_the_environment_does_not_stand_before_loopback(
    kelvin: FakeKelvin, monkeypatch: pytest.MonkeyPatch, unused_url: str
) -> None:
    accept(kelvin)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, unused_url)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Kelvin(kelvin.url) as client:
        assert client.submit(GenerateRequest(prompt="a circle")).id == JOB


@pytest.mark.parametrize(
    ("update", "field"),
    [
        ({"deadline_s": math.nan}, "deadline_s"),
        ({"guidance_scale": math.inf}, "guidance_scale"),
        ({"negative_prompt_range": None}, "negative_prompt_range"),
    ],
)
def test_what_json_would_turn_into_a_default_is_refused_and_never_sent(kelvin, update, field):
    unchecked = GenerateRequest(prompt="a").model_copy(update=update)
    with Kelvin(kelvin.url) as client:
        with pytest.raises(errors.InvalidRequest) as refused:
            client.submit(unchecked)
        with pytest.raises(errors.InvalidRequest) as by_waiting:
            client.generate(unchecked)
    with pytest.raises(errors.InvalidRequest) as by_handle:
        GenerateRequest.model_validate(unchecked)
    assert refused.value.field == field
    assert refused.value.body() == by_waiting.value.body() == by_handle.value.body()
    assert kelvin.seen == []


def test_a_key_goes_to_the_server_and_to_nobody_else(kelvin: FakeKelvin) -> None:
    key, _ = new_key("acme", ("generate",))
    kelvin.on("GET", f"/v1/jobs/{JOB}", sends(200, {"id": JOB, "status": "pending"}))
    kelvin.on("GET", "/picture?signature=secret", sends(200, PICTURE, "image/png"))
    with Kelvin(kelvin.url, api_key=key) as client:
        client.job(JOB)
        client.download(image(kelvin))
    assert kelvin.authorized == [
        (f"/v1/jobs/{JOB}", f"Bearer {key}"),
        ("/picture?signature=secret", None),
    ]


def test_a_wrong_key_is_told_as_the_server_tells_it(kelvin: FakeKelvin) -> None:
    error = errors.Unauthenticated("The API key is wrong or was revoked.", allowed="another")
    kelvin.on("GET", "/v1/models", sends(401, error.body()))
    with Kelvin(kelvin.url) as client, pytest.raises(errors.Unauthenticated):
        client.models()


@pytest.mark.parametrize("key", ["", "kelvin_short", "secret\r\nx: y", "ключ"])
def test_what_is_no_key_is_refused_and_not_repeated(kelvin: FakeKelvin, key: str) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        Kelvin(kelvin.url, api_key=key)
    assert caught.value.field == "api_key"
    assert caught.value.value is None
    assert "secret" not in str(caught.value.body())


def test_a_key_in_the_url_is_in_no_error(unused_url: str) -> None:
    key, _ = new_key("acme", ("generate",))
    with (
        Kelvin(f"{unused_url}/k/{key}") as client,
        pytest.raises(ServerUnreachable) as caught,
    ):
        client.models()
    assert key[10:30] not in json.dumps(caught.value.body())
    assert key[10:30] not in client.url


def test_the_command_takes_the_key_from_its_variable(
    kelvin: FakeKelvin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key, _ = new_key("acme", ("generate",))
    kelvin.on("GET", "/v1/models", sends(200, {"models": []}))
    error = errors.Forbidden("no")
    kelvin.on("POST", "/v1/jobs", sends(403, error.body()))
    monkeypatch.setenv("KELVIN_API_KEY", key)
    monkeypatch.setenv("KELVIN_URL", kelvin.url)
    assert main(["models", "list", "--json"]) == 0
    assert main(["generate", "a circle", "--json"]) == 2
    assert main(["generate", "--help"]) == 0
    assert [told for _, told in kelvin.authorized] == [f"Bearer {key}"] * 2
    said = capsys.readouterr()
    assert key[10:30] not in said.out + said.err
