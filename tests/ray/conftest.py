"""One Kelvin at a time for all tests here, and as few starts of one as can be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ray.world import World


@pytest.fixture(scope="session")
def any_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The store, and whatever Kelvin the last test had on it."""
    world = World(tmp_path_factory.mktemp("world"))
    try:
        yield world
    finally:
        world.close()


@pytest.fixture(scope="module")
def world(any_world: World) -> World:
    """The usual Kelvin: pico, two replicas a stage."""
    any_world.have(replicas=2)
    return any_world
