"""Three nodes of their own address and kind of card; one is cut off, killed, and comes back.

Meanwhile a pool that is tied to labelled nodes grows onto the second one of them.
"""

import json
import os
import re
import subprocess
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
from tests.processes.ownership import own_folder

# Nothing is asserted of a busy machine's speed: it has as long as the whole may take.
pytestmark = pytest.mark.timeout(600)
_WITHIN_S = 540.0
_POLL_S = 0.3
_REPLICA = "ray::ServeReplica:kelvin:"
_RAY = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's own give a node that does not answer half a minute.
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
    "OMP_NUM_THREADS": "1",
}
_LABELS = {
    "H100": "tests.kelvin/place=head",
    "L4": "tests.kelvin/market=spot",
    "A10G": "tests.kelvin/market=spot",
}
_PLACED = {
    "H100": {"denoiser-h100", "pipeline", "decode-spare"},
    "L4": {"denoiser-spot", "text", "decode"},
    "A10G": {"denoiser-spot", "text-spare"},
}


class Nodes:
    """The nodes, what runs on them, and when what happened."""

    def __init__(
        self, folder: Path, there: Mapping[str, Host], store: StorageSettings, ray_folder: Path
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

    def ray(self, *cards: str, more: tuple[str, ...] = ()) -> None:
        """Start nodes and wait until they have joined; on a busy machine some try in vain."""
        started = {card: self._ray(card, more) for card in cards}

        def joined() -> bool:
            for card, (process, _) in started.items():
                if process.poll() is not None:
                    self.there[card].kill()
                    started[card] = self._ray(card, more)
            return all("Ray runtime started" in out.read_text() for _, out in started.values())

        self.until(joined, f"Ray's nodes are there: {', '.join(cards)}")
        if not self.address:
            _, output = started[cards[0]]
            self.address = output.read_text().split("--address='")[1].split("'")[0]

    def _ray(self, card: str, more: tuple[str, ...]) -> tuple[subprocess.Popen[bytes], Path]:
        to = (f"--address={self.address}",) if self.address else ("--head",)
        command = (
            *("-m", "ray.scripts.scripts", "start", "--block", "--include-log-monitor=false"),
            f"--node-ip-address={self.there[card].address}",
            f"--resources={json.dumps({f'accelerator_type:{card}': 1})}",
            f"--labels={_LABELS[card]}",
            f"--object-store-memory={80 << 20}",
            "--dashboard-agent-listen-port=0",
            # Its own, for two that start at once would take the same names for their sockets.
            f"--temp-dir={self.ray_folder / card}",
            *to,
            *more,
        )
        return self._started(card, command, ".log")

    def placed(self) -> dict[str, set[str]]:
        """Return node -> the deployments whose replicas are processes there."""
        return {
            card: {
                re.split(r"[.\0 ]", line.removeprefix(_REPLICA))[0]
                for line in self.there[card].commands()
                if line.startswith(_REPLICA)
            }
            for card in _PLACED
        }

    def until(self, condition: Callable[[], bool], what: str) -> None:
        while not condition():
            if time.monotonic() > self.began + _WITHIN_S:
                logs = "".join(
                    f"\n{path.name}: {path.read_text(errors='replace')[-1500:]}"
                    for path in sorted(self.folder.glob("*-*.*"))
                )
                pytest.fail(f"not within {_WITHIN_S:g} s: {what}; {self.placed()}{logs}")
            time.sleep(_POLL_S)
        print(f"{time.monotonic() - self.began:6.1f} s: {what}")

    def call(self, jobs: int) -> Path:
        output = self.start(
            "caller", "-m", "tests.processes.outside_caller", self.url, str(jobs), suffix=".out"
        )
        self.until(lambda: "accepted" in output.read_text(), "a caller's jobs are accepted")
        return output

    def drain(self, card: str, *options: str) -> tuple[int, dict[str, Any]]:
        command = ("-m", "serve", "drain", self.there[card].address, *options, "--json")
        process, output = self._started("H100", command, ".out")
        said = f"drain {card} {' '.join(options)} has ended"
        self.until(lambda: process.poll() is not None, said)
        return process.returncode, json.loads(output.read_text().splitlines()[-1])

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
        short = cleanup.enter_context(own_folder())
        there = cleanup.enter_context(hosts(*_PLACED, "caller", apart=not refused))
        listener = there["caller"].listening(9000)
        endpoint = f"http://{there['caller'].address}:{listener.getsockname()[1]}"
        port = int(str(storage.endpoint_url).rsplit(":", 1)[1])
        cleanup.enter_context(forwarded(listener, port))
        reached = storage.model_copy(update={"endpoint_url": endpoint})
        yield Nodes(tmp_path, there, reached, short)


def settings(nodes: Nodes) -> dict[str, Any]:
    def pool(name: str, **more: Any) -> dict[str, Any]:
        # Work waits for a pool that has lost its replicas as long as these should take to start.
        return {"name": name, "torch_threads": 1, "num_cpus": 0.1, "start_s": 3.0, **more}

    on_spot = {
        "label_selector": {"tests.kelvin/market": "spot"},
        "max_replicas_per_node": 1,
        "kind_speed": 1.0,  # as an H100's, so that half of the work goes there
        "min_replicas": 1,
        "max_replicas": 2,
    }
    on_head = {"label_selector": {"tests.kelvin/place": "head"}}
    return {
        "model": {"path": "pico"},
        "denoiser": [
            pool("denoiser-h100", accelerator_type="H100"),
            pool("denoiser-spot", **on_spot),
        ],
        "text_encoder": [
            pool("text", accelerator_type="L4"),
            pool("text-spare", accelerator_type="A10G"),
        ],
        "vae_decoder": [pool("decode", accelerator_type="L4"), pool("decode-spare", **on_head)],
        # Whatever comes is more than one replica should bear, and none goes for want of work.
        "autoscaling": {"target_wait_s": 0.1, "target_utilisation": 0.05, "scale_in_after_s": 900},
        "pipeline": {"num_cpus": 2},  # no other node has so many
        "http": {"host": nodes.there["H100"].address, "port": 0, "open_to_all": True},
        "storage": nodes.store.model_dump(mode="json"),
        "embedded_store": {"enabled": False},
        "spool": {"directory": str(nodes.folder / "spool")},
    }


def bring_up(nodes: Nodes) -> None:
    nodes.ray("H100", more=("--port=0", "--num-cpus=4", "--include-dashboard=false"))
    nodes.ray("L4", "A10G", more=("--num-cpus=1",))
    config = nodes.folder / "kelvin.yaml"
    config.write_text(yaml.safe_dump(settings(nodes)))
    nodes.environ["RAY_ADDRESS"] = nodes.address
    out = nodes.start("H100", "-m", "serve", "up", "--config", str(config), "--json", suffix=".out")
    nodes.until(lambda: "\n" in out.read_text(), "Kelvin serves")
    nodes.url = json.loads(out.read_text().splitlines()[0])["url"]


def test_pools_are_where_they_were_told_and_a_node_may_be_lost(nodes: Nodes):
    bring_up(nodes)
    placed = nodes.placed()
    spot = [card for card, pools in placed.items() if "denoiser-spot" in pools]
    assert spot in (["L4"], ["A10G"])
    placed[spot[0]].remove("denoiser-spot")
    assert placed == {card: pools - {"denoiser-spot"} for card, pools in _PLACED.items()}

    first = nodes.call(2)
    nodes.until(lambda: nodes.placed() == _PLACED, "the pool has grown onto the other spot node")
    nodes.answered(first, 2)

    busy = nodes.call(4)
    lost = nodes.there["L4"]  # of every stage something is there
    lost.cut_off()
    nodes.answered(busy, 4)
    lost.kill()
    assert not nodes.placed()["L4"]
    nodes.answered(nodes.call(1), 1)

    lost.join_again()
    nodes.ray("L4", more=("--num-cpus=1",))
    nodes.until(lambda: nodes.placed() == _PLACED, "the node is back, and its pools on it")
    nodes.answered(nodes.call(2), 2)


@pytest.mark.slow
def test_a_node_goes_by_its_deadline_and_the_last_one_of_a_stage_by_force(nodes: Nodes):
    if nodes.there["L4"].address == nodes.there["A10G"].address:
        pytest.skip("nodes that share an address are not told apart")
    bring_up(nodes)
    l4 = nodes.there["L4"]
    # No other node has its card, so replicas stay; a new node of the machine takes them over.
    assert nodes.drain("L4", "--wait", "3")[0] == 1
    nodes.ray("L4", more=("--num-cpus=1",))
    nodes.until(lambda: sum("/raylet/raylet" in each for each in l4.commands()) == 1, "it has gone")
    nodes.until(lambda: {"text", "decode"} <= nodes.placed()["L4"], "the new one has its pools")

    code, told = nodes.drain("A10G", "--deadline", "5", "--wait", "200")
    assert (code, told["left"]) == (0, 0), told
    nodes.until(lambda: not nodes.placed()["A10G"], "nothing is left on A10G")
    nodes.answered(nodes.call(1), 1)

    code, told = nodes.drain("L4")
    assert (code, told["error"]["field"]) == (2, "node"), told
    assert "stage text has no replica" in told["error"]["message"]
    code, told = nodes.drain("L4", "--force", "--wait", "3")
    assert (code, told["drains"]) == (1, True), told
    nodes.answered(nodes.call(1), 1)  # it serves as long as there is no room elsewhere
    code, told = nodes.drain("L4", "--force", "--deadline", "5", "--wait", "200")
    assert (code, told["left"]) == (0, 0), told
