"""How large Ray's object store may become, by what the machine has."""

import os
import shutil

import pytest

from serve.local_ray import object_store_bytes

_GIB = 1 << 30


@pytest.mark.parametrize(
    ("free_gib", "store_gib"),
    [(0.0625, 0.25), (0.5, 0.25), (4, 1.2), (1000, 4)],  # 64 MiB is what a container has at first
)
def test_by_what_is_free(free_gib, store_gib, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sysconf", lambda name: 1 << 20)  # a TiB
    disk = shutil.disk_usage(tmp_path)._replace(free=int(free_gib * _GIB))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    assert object_store_bytes(str(tmp_path)) == pytest.approx(store_gib * _GIB, rel=1e-6)


def test_by_memory_where_there_is_no_shared_memory(monkeypatch, tmp_path):
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 8 * _GIB // 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert object_store_bytes(str(tmp_path / "none")) == pytest.approx(0.3 * 8 * _GIB, rel=1e-6)
