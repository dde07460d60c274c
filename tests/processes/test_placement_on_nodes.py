"""Three nodes of their own address and kind of card; one is cut off, killed, and comes back."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.config import StorageSettings
from tests.processes.own_network import Host, forwarded, hosts, namespaces_refused

# Nothing is asserted of a busy machine's speed.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
_WITHIN_S = 200.0
_REPLICA = "ray::ServeReplica:kelvin:"
_RAY = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's own give a node that does not answer half a minute.
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "OMP_NUM_THREADS": "1",
}
_PLACED = {
    "H100": {"denoiser-h100", "pipeline", "text-spare", "decode-spare"},
    "L4": {"denoiser-l4", "text", "decode"},
    "A10G": {"denoiser-a10g"},
}


class Nodes:
    """The nodes, what runs on them, and when what happened."""

    def __init__(
        self, folder: Path, there: Mapping[str, Host], store: StorageSettings, ray_folder: str
    ) -> None:
        self.folder = folder
        self.there = there
        self.store = store
        self.began = time.monotonic()
        self.environ = _RAY | {
            name: os.environ[name] for name in os.environ if name.startswith("AWS_")
        }
        self.address = ""
        self.url = ""
        self.ray_folder = ray_folder
        self._files = 0

    def start(self, host: str, *command: str, suffix: str = ".log") -> Path:
        return self._started(host, command, suffix)[1]

    def _started(
        self, host: str, command: tuple[str, ...], suffix: str
    ) -> tuple[subprocess.Popen[bytes], Path]:
        self._files += 1
        output = self.folder / f"{self._files}-{host}{suffix}"
        return self.there[host].popen(*command, environ=self.environ, output=output), output

    def ray(self, card: str, *more: str) -> None:
        """Start a card's node and wait until it has joined; on a busy machine some try in vain."""
        command = (
            *("-m", "ray.scripts.scripts", "start", "--block", "--include-log-monitor=false"),
            f"--node-ip-address={self.there[card].address}",
            f"--resources={json.dumps({f'accelerator_type:{card}': 1})}",
            f"--labels=tests.kelvin/place={card.lower()}",
            f"--object-store-memory={80 << 20}",
            *more,
        )
        process, output = self._started(card, command, ".log")

        def joined() -> bool:
            nonlocal process, output
            if process.poll() is not None:
                self.there[card].kill()
                process, output = self._started(card, command, ".log")
            return "Ray runtime started" in output.read_text()

        self.until(joined, f"Ray's node {card} is there")
        if not self.address:
            self.address = output.read_text().split("--address='")[1].split("'")[0]

    def placed(self) -> dict[str, set[str]]:
        """Return node -> the deployments whose replicas are processes there."""
        return {
            card: {
                re.split(r"[.\0 ]", line.removeprefix(_REPLICA))[0]
                for line in self.there[card].processes().values()
                if line.startswith(_REPLICA)
            }
            for card in _PLACED
        }

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _WITHIN_S
        while not condition():
            if time.monotonic() > deadline:
                logs = "".join(
                    f"\n{path.name}: {path.read_text(errors='replace')[-1500:]}"
                    for path in sorted(self.folder.glob("*-*.*"))
                )
                pytest.fail(f"{what}: not within {_WITHIN_S:g} s; {self.placed()}{logs}")
            time.sleep(0.2)
        print(f"{time.monotonic() - self.began:6.1f} s: {what}")

    def call(self, jobs: int) -> Path:
        output = self.start(
            "caller", "-m", "tests.processes.outside_caller", self.url, str(jobs), suffix=".out"
        )
        self.until(lambda: "accepted" in output.read_text(), "a caller's jobs are accepted")
        return output

    def answered(self, output: Path, jobs: int) -> None:
        self.until(lambda: output.read_text().count("\n") > 1, "the caller has its pictures")
        told = json.loads(output.read_text().splitlines()[1])
        assert len(told["sizes"]) == 2 * jobs
        assert min(told["sizes"]) > 100


@pytest.fixture
def nodes(tmp_path: Path, storage: StorageSettings) -> Iterator[Nodes]:
    refused = namespaces_refused()
    if refused:
        warnings.warn(f"no network namespaces ({refused}): raylets of one host", stacklevel=1)
    with ExitStack() as cleanup:
        # A short path: Unix sockets lie below it.
        short = tempfile.mkdtemp(prefix="kelvin-", dir="/tmp")
        cleanup.callback(shutil.rmtree, short, ignore_errors=True)
        there = cleanup.enter_context(hosts(*_PLACED, "caller", apart=not refused))
        listener = there["caller"].listening(9000)
        endpoint = f"http://{there['caller'].address}:{listener.getsockname()[1]}"
        port = int(str(storage.endpoint_url).rsplit(":", 1)[1])
        cleanup.enter_context(forwarded(listener, port))
        reached = storage.model_copy(update={"endpoint_url": endpoint})
        yield Nodes(tmp_path, there, reached, short)


def settings(nodes: Nodes) -> dict[str, Any]:
    def pool(name: str, card: str, **more: Any) -> dict[str, Any]:
        # Work waits for a pool that has lost its replicas as long as these should take to start.
        small = {"torch_threads": 1, "num_cpus": 0.1, "start_s": 3.0}
        return {"name": name, **small, "accelerator_type": card, **more}

    on_head = {"tests.kelvin/place": "h100"}
    spare = {"torch_threads": 1, "num_cpus": 0.1, "label_selector": on_head}
    return {
        "model": {"path": "pico"},
        "denoiser": [pool(f"denoiser-{card.lower()}", card) for card in _PLACED],
        "text_encoder": [pool("text", "L4"), {"name": "text-spare", **spare}],
        "vae_decoder": [pool("decode", "L4"), {"name": "decode-spare", **spare}],
        "pipeline": {"num_cpus": 2},  # no other node has so many
        "http": {"host": nodes.there["H100"].address, "port": 0, "open_to_all": True},
        "storage": nodes.store.model_dump(mode="json"),
        "embedded_store": {"enabled": False},
        "journal": {"lease_s": 6.0},
        "spool": {"directory": str(nodes.folder / "spool")},
    }


def bring_up(nodes: Nodes) -> None:
    folder = f"--temp-dir={nodes.ray_folder}"
    nodes.ray("H100", "--head", "--port=0", "--num-cpus=4", "--include-dashboard=false", folder)
    for card in ("L4", "A10G"):
        nodes.ray(card, f"--address={nodes.address}", "--num-cpus=1")
    config = nodes.folder / "kelvin.yaml"
    config.write_text(yaml.safe_dump(settings(nodes)))
    nodes.environ["RAY_ADDRESS"] = nodes.address
    out = nodes.start("H100", "-m", "serve", "up", "--config", str(config), "--json", suffix=".out")
    nodes.until(lambda: "\n" in out.read_text(), "Kelvin serves")
    nodes.url = json.loads(out.read_text().splitlines()[0])["url"]


def test_pools_are_where_they_were_told_and_a_node_may_be_lost(nodes: Nodes):
    bring_up(nodes)
    nodes.until(lambda: nodes.placed() == _PLACED, "each pool is on its own node")
    nodes.answered(nodes.call(1), 1)

    busy = nodes.call(4)
    lost = nodes.there["L4"]  # of every stage something is there
    lost.cut_off()
    nodes.answered(busy, 4)
    lost.kill()
    assert not nodes.placed()["L4"]
    nodes.answered(nodes.call(1), 1)

    lost.join_again()
    nodes.ray("L4", f"--address={nodes.address}", "--num-cpus=1")
    nodes.until(lambda: nodes.placed() == _PLACED, "the node is back, and its pool on it")
    nodes.answered(nodes.call(2), 2)
