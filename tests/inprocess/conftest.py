"""What the tests of one process share."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest


@pytest.fixture
def shift_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A function that moves the S3 client's clock by some hours; the server's stays right."""

    def shift(hours: float) -> None:
        def shifted(remove_tzinfo: bool = True) -> datetime:
            now = datetime.now(UTC) + timedelta(hours=hours)
            return now.replace(tzinfo=None) if remove_tzinfo else now

        monkeypatch.setattr("botocore.auth.get_current_datetime", shifted)

    return shift
