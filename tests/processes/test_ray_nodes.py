"""Where a test of nodes fails, it says what is needed to understand it, and keeps the rest."""

from pathlib import Path

import pytest

from serve.config import StorageSettings
from tests.processes.ray_nodes import ray_nodes


def test_a_caller_that_has_ended_is_not_waited_for_and_what_ray_wrote_is_shown_and_kept(
    tmp_path: Path, storage: StorageSettings
):
    with ray_nodes(tmp_path, storage) as nodes:
        logs = nodes.ray_folder / "H100/session_2026-11-27/logs"
        (logs / "serve").mkdir(parents=True)
        (logs / "gcs_server.out").write_text("a node was marked dead\n")
        (logs / "serve/replica_kelvin_pipeline_1.log").write_text("Stage decode: trying again.\n")
        (logs / "raylet.out").write_text("much that says little\n")
        nodes.url = "http://127.0.0.1:9"  # nobody is there
        with pytest.raises(pytest.fail.Exception) as failure:
            nodes.call(1)
    said = str(failure.value)
    assert "the caller has ended" in said
    assert "marked dead" in said
    assert "trying again" in said
    assert "says little" not in said
    kept = tmp_path / "ray/H100"
    assert (kept / "raylet.out").read_text() == "much that says little\n"
    assert str(kept.parent) in said
    assert not nodes.ray_folder.exists()
