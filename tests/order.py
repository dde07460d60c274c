"""In which order the tests come."""

from __future__ import annotations

import pytest

SHARING_A_KELVIN = "tests/ray/"
_OWN_PROCESSES = "tests/processes/"


def put_in_order(items: list[pytest.Item], *, divided: bool) -> None:
    """Sort the tests; those on the usual Kelvin before those that have one started for them.

    Args:
        items: All tests that were collected.
        divided: What takes longest comes first then; else what is quickest to tell of a mistake.
    """

    def rank(item: pytest.Item) -> tuple[int, bool]:
        folders = (SHARING_A_KELVIN, _OWN_PROCESSES)
        place = next((i for i, folder in enumerate(folders) if item.nodeid.startswith(folder)), 2)
        return (place if divided else -place, item.get_closest_marker("own_kelvin") is not None)

    items.sort(key=rank)
