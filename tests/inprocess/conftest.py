"""What the tests of one process share."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest

from serve.config import StorageSettings
from serve.pipeline import Pipeline
from tests.inprocess.served import Served, served
from tests.inprocess.stand_in_stages import StandIn, new_pipeline


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
def shift_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A function that moves the S3 client's clock by some hours; the server's stays right."""

    def shift(hours: float) -> None:
        def shifted(remove_tzinfo: bool = True) -> datetime:
            now = datetime.now(UTC) + timedelta(hours=hours)
            return now.replace(tzinfo=None) if remove_tzinfo else now

        monkeypatch.setattr("botocore.auth.get_current_datetime", shifted)

    return shift
