"""Who joins a cluster's Ray is told what is wrong with its address, and soon."""

import socket

import pytest
import ray

from serve.errors import ConfigurationError
from serve.model_admin import join_ray


@pytest.fixture
def _nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Ray would try for minutes")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)


@pytest.mark.usefixtures("_nothing_is_joined")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_address_where_nobody_answers_is_refused_before_ray_tries(
    host: str, monkeypatch: pytest.MonkeyPatch
):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"{host}:{taken.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigurationError) as refused:
            join_ray()
    assert (refused.value.field, refused.value.value) == ("RAY_ADDRESS", address)
    assert "refused" in refused.value.message


@pytest.mark.usefixtures("_nothing_is_joined")
@pytest.mark.parametrize("address", ["auto", "ray://head:10001"])
def test_what_is_no_host_and_port_is_left_to_ray(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(AssertionError, match="Ray would try"):
        join_ray()
