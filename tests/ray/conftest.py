"""One Kelvin for all tests here, two replicas a stage; whoever restarts it leaves it running."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ray.world import World, wait_until

__all__ = ["World", "wait_until", "world"]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    try:
        world.start(replicas=2)
        yield world
    finally:
        world.close()
