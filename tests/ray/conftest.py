"""One Kelvin for all tests here, two replicas a stage; whoever restarts it leaves it running."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ray.world import World, wait_until

__all__ = ["World", "unstarted_world", "wait_until", "world"]


@pytest.fixture(scope="session")
def unstarted_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The store, and whatever Kelvin a test starts on it; the usual one may run already."""
    world = World(tmp_path_factory.mktemp("world"))
    try:
        yield world
    finally:
        world.close()


@pytest.fixture(scope="session")
def world(unstarted_world: World) -> World:
    unstarted_world.start(replicas=2)
    return unstarted_world
