"""Ray nodes of their own address and kind of card, with Kelvin on them and callers outside.

Where something goes wrong, what Ray and Kelvin wrote down is kept, and the telling part is shown.
"""

import json
import os
import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from serve.config import StorageSettings
from tests.processes.own_network import Host, forwarded, hosts, namespaces_refused
from tests.processes.ownership import own_folder

# Nothing is asserted of a busy machine's speed: it has as long as the whole may take.
_WITHIN_S = 540.0
_POLL_S = 0.3
_ANSWERS_WITHIN_S = 30.0
_SHOWN_OF_A_LOG = 2500  # characters
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
LABELS = {
    "H100": "tests.kelvin/place=head",
    "L4": "tests.kelvin/market=spot",
    "A10G": "tests.kelvin/market=spot",
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
        self._callers: dict[Path, subprocess.Popen[bytes]] = {}

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
            f"--labels={LABELS[card]}",
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
            for card in LABELS
        }

    def until(self, condition: Callable[[], bool], what: str) -> None:
        while not condition():
            if time.monotonic() > self.began + _WITHIN_S:
                self.fail(f"not within {_WITHIN_S:g} s: {what}")
            time.sleep(_POLL_S)
        print(f"{time.monotonic() - self.began:6.1f} s: {what}")

    def fail(self, why: str) -> None:
        """Fail with what there is to understand it by."""
        jobs = self._jobs() if self.url else ""
        logs = "".join(
            f"\n{path.relative_to(path.parents[1])}: {_end(path)}"
            for path in (*sorted(self.folder.glob("*-*.*")), *_telling(self.ray_folder))
        )
        pytest.fail(f"{why}; {self.placed()}\nRay's logs: {self.folder / 'ray'}{jobs}{logs}")

    def _jobs(self) -> str:
        asked, output = self._started(
            "caller", ("-m", "tests.processes.outside_caller", self.url, "what-jobs"), ".out"
        )
        try:
            asked.wait(_ANSWERS_WITHIN_S)
        except subprocess.TimeoutExpired:
            asked.kill()
        return f"\njobs: {output.read_text()}"

    def call(self, jobs: int) -> Path:
        command = ("-m", "tests.processes.outside_caller", self.url, str(jobs))
        process, output = self._started("caller", command, ".out")
        self._callers[output] = process
        self.until(lambda: self._has_told(output, 1), "a caller's jobs are accepted")
        return output

    def _has_told(self, output: Path, lines: int) -> bool:
        has_ended = self._callers[output].poll() is not None
        if output.read_text().count("\n") >= lines:
            return True
        if has_ended:
            self.fail(f"{output.name}: the caller has ended, its error is in what stderr shows")
        return False

    def drain(self, card: str, *options: str) -> tuple[int, dict[str, Any]]:
        command = ("-m", "serve", "drain", self.there[card].address, *options, "--json")
        process, output = self._started("H100", command, ".out")
        said = f"drain {card} {' '.join(options)} has ended"
        self.until(lambda: process.poll() is not None, said)
        return process.returncode, json.loads(output.read_text().splitlines()[-1])

    def answered(self, output: Path, jobs: int) -> None:
        self.until(lambda: self._has_told(output, 2), "the caller has its pictures")
        told = json.loads(output.read_text().splitlines()[1])
        assert len(told["sizes"]) == 2 * jobs
        assert min(told["sizes"]) > 100


@contextmanager
def ray_nodes(folder: Path, storage: StorageSettings) -> Iterator[Nodes]:
    """Give hosts for nodes, none of which runs yet, and a caller; what they wrote stays.

    Args:
        folder: Of logs and outputs.
        storage: As this machine reaches it.
    """
    refused = namespaces_refused()
    if refused:
        warnings.warn(f"no network namespaces ({refused}): raylets of one host", stacklevel=1)
    with ExitStack() as cleanup:
        short = cleanup.enter_context(own_folder())
        # Once nobody writes there any more.
        cleanup.callback(_keep, short, folder / "ray")
        there = cleanup.enter_context(hosts(*LABELS, "caller", apart=not refused))
        listener = there["caller"].listening(9000)
        endpoint = f"http://{there['caller'].address}:{listener.getsockname()[1]}"
        port = int(str(storage.endpoint_url).rsplit(":", 1)[1])
        cleanup.enter_context(forwarded(listener, port))
        reached = storage.model_copy(update={"endpoint_url": endpoint})
        yield Nodes(folder, there, reached, short)


def _telling(ray_folder: Path) -> list[Path]:
    """Return those logs of Ray that tell of calls, replicas and nodes that are lost."""
    kinds = ("serve/replica_kelvin_pipeline_*.log", "serve/controller_*.log", "gcs_server.out")
    return [each for kind in kinds for each in sorted(ray_folder.glob(f"*/session_2*/logs/{kind}"))]


def _end(path: Path) -> str:
    return path.read_text(errors="replace")[-_SHOWN_OF_A_LOG:]


def _keep(ray_folder: Path, where: Path) -> None:
    for logs in ray_folder.glob("*/session_2*/logs"):
        shutil.copytree(logs, where / logs.parents[1].name, dirs_exist_ok=True)
