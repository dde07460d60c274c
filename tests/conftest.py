"""What every tier shares: a clean environment, and one real S3 server a test run."""

import os
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings

from serve.config import StorageSettings
from serve.embedded_store import EmbeddedStore
from tests.order import put_in_order

# The machine's own settings and credentials must decide no test; nor its proxies, nor a search for
# credentials at a cloud's metadata address.
for _name in list(os.environ):
    if _name.upper().startswith(("AWS_", "KELVIN_", "OTEL_")) or _name.lower().endswith("_proxy"):
        del os.environ[_name]
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ["AWS_CONFIG_FILE"] = os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull

# The other worker has the other core; torch's threads would wait for each other, spinning.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# How long an example takes says more about the machine than about the code.
hypothesis_settings.register_profile("kelvin", deadline=None, derandomize=True)
hypothesis_settings.load_profile("kelvin")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    put_in_order(items, divided=hasattr(config, "workerinput"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.two_workers import ByFile  # where xdist is installed

    return ByFile(config, log)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StorageSettings]:
    """A running SeaweedFS, for the whole test run. Its settings name its credentials file."""
    with EmbeddedStore(tmp_path_factory.mktemp("s3"), "kelvin") as store:
        yield store.storage_settings(StorageSettings())


@pytest.fixture
def storage(s3: StorageSettings) -> StorageSettings:
    """The same server, with a prefix that no other test uses."""
    return s3.model_copy(update={"prefix": f"test-{uuid.uuid4().hex}/"})
