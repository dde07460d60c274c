"""`kelvin status` of a real service: what its replicas really tell fits the tables."""

import json

import pytest

from serve.__main__ import main
from tests.inprocess.local_service import Service


def test_every_pool_and_replica_is_shown(
    service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("KELVIN_API_KEY", service.key())
    assert main(("status", "--url", service.url, "--json")) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(("status", "--url", service.url, "--once")) == 0
    shown = capsys.readouterr().err
    for pool, decided in told["autoscaling"]["pools"].items():
        assert pool in shown
        assert decided["reason"] in shown
    replicas = [replica for stage in told["stages"].values() for replica in stage]
    assert {replica["stage"] for replica in replicas} == {"text", "denoise", "decode"}
    assert shown.count(replicas[0]["node"][:8]) >= len(replicas)
