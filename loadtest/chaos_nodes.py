"""Further nodes of a Ray on this machine, which may be killed."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from types import TracebackType

import ray

from loadtest.chaos_victims import kill_raylet_of

_OBJECT_STORE_BYTES = 80 << 20
_JOIN_WITHIN_S = 240.0
_LEAVES_S = 20.0
_POLL_S = 0.2


class WorkerNodes:
    """Nodes that join the Ray which this process is connected to; a context manager.

    Args:
        number: Of nodes.
        num_cpus: Of each, as Ray counts them.
    """

    def __init__(self, number: int, num_cpus: int) -> None:
        self._number = number
        self._num_cpus = num_cpus
        self._nodes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start them and wait until they have joined.

        Raises:
            RuntimeError: They have not.
        """
        there = _nodes_alive()
        self._nodes = [self._started() for _ in range(self._number)]
        deadline = time.monotonic() + _JOIN_WITHIN_S
        while _nodes_alive() < there + self._number:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self._number} further nodes do not join Ray")
            self._tend()
            time.sleep(_POLL_S)

    def kill_one(self, draw: random.Random) -> int | None:
        """Kill a raylet with SIGKILL and start another node in its place.

        Args:
            draw: Chooses which.

        Returns:
            Its process id; None: it is not there just now.
        """
        self._tend()
        node = draw.choice(self._nodes)
        pid = kill_raylet_of(node.pid)
        if pid is not None:
            node.kill()  # its parent, which would only tidy up
            node.wait()
            self._tend()
        return pid

    def _tend(self) -> None:
        """Start another in the place of each that has ended: on a busy machine some do not join."""
        for index, node in enumerate(self._nodes):
            if node.poll() is not None:
                self._nodes[index] = self._started()

    def kill(self) -> None:
        """Kill all with SIGKILL, and start none."""
        for node in self._nodes:
            kill_raylet_of(node.pid)
            node.kill()
            node.wait()
        self._nodes = []

    def stop(self) -> None:
        """Let them leave in order, so that Ray knows at once."""
        for node in self._nodes:
            node.terminate()
        for node in self._nodes:
            try:
                node.wait(_LEAVES_S)
            except subprocess.TimeoutExpired:
                kill_raylet_of(node.pid)
                node.kill()
                node.wait()
        self._nodes = []

    def __enter__(self) -> WorkerNodes:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _started(self) -> subprocess.Popen[bytes]:
        address = ray.get_runtime_context().gcs_address
        options = {
            "--address": address,
            "--num-cpus": self._num_cpus,
            "--object-store-memory": _OBJECT_STORE_BYTES,
            "--include-log-monitor": "false",
            "--dashboard-agent-listen-port": 0,
        }
        return subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
            + [f"{name}={value}" for name, value in options.items()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def _nodes_alive() -> int:
    return sum(bool(node["Alive"]) for node in ray.nodes())
