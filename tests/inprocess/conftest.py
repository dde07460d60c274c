"""What the tests of one process share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from serve.config import StorageSettings
from serve.key_store import FileKeys
from serve.pipeline import Pipeline
from tests.inprocess.served import Served, served
from tests.inprocess.stand_in_stages import StandIn, new_pipeline

if TYPE_CHECKING:
    from tests.inprocess.local_service import Service


@pytest.fixture
def stages() -> StandIn:
    """Stages that answer at once, as a test tells them to."""
    return StandIn()


@pytest.fixture
def pipeline(
    stages: StandIn, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> Pipeline:
    """A Pipeline on those stages and a real store."""
    return new_pipeline(stages, storage, monkeypatch)


@pytest.fixture
def server(pipeline: Pipeline) -> Iterator[Served]:
    """That Pipeline behind a real HTTP server."""
    with served(pipeline) as server:
        yield server


@pytest.fixture
def keys(tmp_path: Path) -> FileKeys:
    """Keys of callers, in `keys.json` of the test's folder."""
    return FileKeys(tmp_path / "keys.json")


@pytest.fixture(scope="session")
def service(s3: StorageSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A whole service in this process, on a real socket; of those tests that speak HTTP to one."""
    from tests.inprocess.local_service import local_service  # with torch

    storage = s3.model_copy(update={"prefix": "service/"})
    with local_service(storage, tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture
def shift_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A function that moves the S3 client's clock by some hours; the server's stays right."""

    def shift(hours: float) -> None:
        def shifted(remove_tzinfo: bool = True) -> datetime:
            now = datetime.now(UTC) + timedelta(hours=hours)
            return now.replace(tzinfo=None) if remove_tzinfo else now

        monkeypatch.setattr("botocore.auth.get_current_datetime", shifted)

    return shift
