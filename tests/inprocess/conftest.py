"""What the tests of one process share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from serve import endings as endings_module
from serve.config import StorageSettings
from serve.jobs import JobJournal
from serve.journal_settings import JournalSettings
from serve.key_store import FileKeys
from serve.pipeline import Pipeline
from serve.storage import ObjectStore
from tests.inprocess.ended_pipelines import LEASE_S
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
def make_leased(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Pipeline]:
    """A function that makes Pipelines on given stages whose leases are short."""
    monkeypatch.setattr(endings_module, "_ELSEWHERE_POLL_S", 0.05)

    def make(stages: StandIn, **journal: Any) -> Pipeline:
        settings = JournalSettings(**{"lease_s": LEASE_S, **journal})
        return new_pipeline(stages, storage, monkeypatch, journal=settings)

    return make


@pytest.fixture
def store(storage: StorageSettings) -> Iterator[ObjectStore]:
    """The store of this test's Pipelines."""
    made = ObjectStore(storage)
    yield made
    made.close()


@pytest.fixture
def journal(store: ObjectStore) -> JobJournal:
    """The journal in it."""
    return JobJournal(store)


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
