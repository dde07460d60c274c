"""What was compiled comes from the node's own disk: nothing is unpickled that others may write."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deployments.replica import SHARED_CACHES

ROOT = Path(__file__).parents[2]
_FLAGS = """
import importlib, json
from deployments.replica import SHARED_CACHES, prepare_torch
from serve.config import PoolSettings
if {first!r}:
    importlib.import_module({first!r})
prepare_torch(PoolSettings(name="pool"), 1)
read = [getattr(importlib.import_module(each), name) for each, name in SHARED_CACHES.values()]
print(json.dumps(read))
"""
_UNPICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
_READERS = {"torch.load", "torch.compiler.load_cache_artifacts", "torch.export.load"}


@pytest.mark.parametrize("first", ["", "deployments.sd3.vae"], ids=["torch", "torch that compiles"])
def test_no_replica_asks_a_shared_cache_of_compiled_graphs_even_where_it_is_told_to(first: str):
    done = subprocess.run(
        [sys.executable, "-c", _FLAGS.format(first=first)],
        env={**os.environ, **dict.fromkeys(SHARED_CACHES, "1")},
        stdout=subprocess.PIPE,
        cwd=ROOT,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [False] * len(SHARED_CACHES)


@pytest.mark.parametrize("package", ["serve", "deployments", "cluster"])
def test_nothing_is_unpickled(package: str):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not _UNPICKLES & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in _READERS, path
                allowed = [each for each in node.keywords if each.arg == "allow_pickle"]
                assert not allowed, path


def test_caches_of_the_image_are_on_the_nodes_own_disk():
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text()
    caches = dict(re.findall(r"\b(TRITON_CACHE_DIR|TORCHINDUCTOR_CACHE_DIR)=(\S+)", dockerfile))
    assert len(caches) == 2
    home = Path("/home/ray/.cache")
    assert all(Path(folder).parent == home for folder in caches.values())

    aws = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())
    assert f"-v /opt/cache:{home}" in aws["docker"]["run_options"]

    service = yaml.safe_load((ROOT / "cluster" / "kuberay" / "rayservice.yaml").read_text())
    cluster = service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            holds = {
                mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]
            }
            assert "hostPath" in holds[str(home)]
            assert not [path for path in holds if home in Path(path).parents]
