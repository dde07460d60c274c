"""Which part of Kelvin may load what: callers need no torch, the model's code no Ray."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_IMPORT_ALL = """
import importlib, pkgutil, sys
for name in {packages!r}:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(getattr(package, "__path__", []), name + "."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as missing:
            if missing.name != "triton":  # which only torch builds for GPUs bring
                raise
sys.exit(", ".join({forbidden!r} & set(sys.modules)) or 0)
"""


@pytest.mark.parametrize(
    ("packages", "forbidden"),
    [
        (("serve",), {"torch", "diffusers", "transformers"}),
        (("deployments.payloads", "serve.requests", "serve.client"), {"torch", "ray", "botocore"}),
        (("deployments.sd3", "deployments.engine"), {"ray"}),
        # Importing them takes longer than reading Large's weights: a new replica waits for it.
        (
            ("deployments.sd3.mmdit", "deployments.engine", "deployments.warm_up"),
            {"ray", "diffusers", "transformers"},
        ),
        (("cluster.autoscaling", "cluster.load_board", "cluster.thermal"), {"torch", "ray"}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_no_layer_loads_what_is_not_its_own(packages: tuple[str, ...], forbidden: set[str]) -> None:
    script = _IMPORT_ALL.format(packages=packages, forbidden=forbidden)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
