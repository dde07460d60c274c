"""How `make test` divides the tests between three processes of pytest-xdist, on two cores.

The tests on tests/ray's Kelvin mostly wait: for processes that start and leases that run out; those
that start Kelvins of their own wait less, and the others compute. So one worker goes through
tests/ray in its order, one through tests/processes, so that there are never more than two Kelvins,
and one through the rest, file by file; whoever has done, shares what is left of that.
"""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.order import OWN_PROCESSES, SHARING_A_KELVIN


class ByFile(LoadScopeScheduling):
    """Hands out the files in the order of the collection, and two folders as if each were one."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        for folder in (SHARING_A_KELVIN, OWN_PROCESSES):
            if nodeid.startswith(folder):
                return folder
        return nodeid.split("::")[0]
