"""How `make test` divides the tests between two processes of pytest-xdist.

The tests on tests/ray's Kelvin mostly wait: for processes that start and leases that run out. The
others compute. So one worker goes through tests/ray in its order and the other through the rest,
file by file, beginning with those that start Kelvins of their own; what is left when tests/ray is
done, both share.
"""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.order import SHARING_A_KELVIN


class ByFile(LoadScopeScheduling):
    """Hands out the files in the order of the collection, and tests/ray as if it were one."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return SHARING_A_KELVIN if nodeid.startswith(SHARING_A_KELVIN) else nodeid.split("::")[0]
