"""How many threads of torch a replica takes that is not told."""

import os

import pytest

from deployments.replica import all_cores, cores_to_denoise, half_the_cores
from serve.config import PoolSettings


@pytest.mark.parametrize(("cores", "half"), [(1, 1), (2, 1), (7, 3), (64, 32)])
def test_denoising_takes_all_cores_where_it_is_one_replica_without_a_card(monkeypatch, cores, half):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert (all_cores(), half_the_cores()) == (cores, half)
    assert cores_to_denoise(PoolSettings(name="d")) == cores
    for more in (
        {"num_replicas": 2},
        {"num_replicas": 1, "min_replicas": 0, "max_replicas": 2},
        {"num_gpus": 1.0},
    ):
        assert cores_to_denoise(PoolSettings.model_validate({"name": "d", **more})) == half
