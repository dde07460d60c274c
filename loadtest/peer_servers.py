"""One arm of the comparison on a CPU as a server: a process that says where it listens.

    python -m loadtest.peer_servers fastapi --model PLAIN --said FILE

It runs until SIGTERM. Peers answer `GET /imagine` with a PNG; Kelvin is `kelvin up` with a store of
its own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.commands.stopping import end_process, local_kelvin, stoppable, wait_for_stop
from serve.config import load_settings

SERVERS = {
    "tutorial": "(a) Ray Serve around diffusers' pipeline, as in Ray's own tutorial",
    "batched": "(b) the same with compiled blocks and serve.batch",
    "fastapi": "(c) FastAPI around diffusers' pipeline, one call at a time",
    "kelvin": "Kelvin with its defaults",
}
_LONGEST_START_S = 420.0
_LONGEST_STOP_S = 40.0


@dataclass(frozen=True)
class Server:
    """An arm that listens."""

    url: str
    pid: int  # the root of its processes


@contextmanager
def server(name: str, model: Path, log: Path) -> Iterator[Server]:
    """Run one arm in processes of its own and yield where it is once it listens; as `listening`.

    Args:
        name: Of SERVERS.
        model: Plain folder, for peers.
        log: File that gets what it says.
    """
    command = [sys.executable, "-m", "loadtest.peer_servers", name, "--model", str(model)]
    with listening(name, command, log) as running:
        yield running


@contextmanager
def listening(name: str, command: Sequence[str], log: Path) -> Iterator[Server]:
    """Run a command until the end of the context and yield where it is once it listens.

    Args:
        name: For errors.
        command: Writes its URL to the file that it gets as `--said`, and stops at SIGTERM.
        log: File that gets what it says.

    Raises:
        RuntimeError: It ended, or did not come up in time; the last of what it said is told.
    """
    said = log.with_suffix(".url")
    said.unlink(missing_ok=True)
    command = [*command, "--said", str(said)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    # A run that was killed while it compiled leaves halves of libraries, which stop the next one.
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(log.with_suffix(".compiled"))
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, env=environment
        )
    try:
        give_up_at = time.monotonic() + _LONGEST_START_S
        while not said.is_file():
            if process.poll() is not None or time.monotonic() > give_up_at:
                words = log.read_text(errors="replace")[-1500:]
                raise RuntimeError(f"{name} did not come up: {words}")
            time.sleep(0.1)
        yield Server(said.read_text(), process.pid)
    finally:
        process.terminate()
        try:
            process.wait(_LONGEST_STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    """Return a port of loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tell(said: Path, url: str) -> None:
    """Write where a server listens, whole or not at all."""
    part = said.with_suffix(".part")
    part.write_text(url)
    os.replace(part, said)


def _serve_kelvin(said: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="kelvin-peers-") as folder:
        settings = load_settings(
            overrides={
                "model": {"path": "builtin"},
                "http": {"port": 0},
                "embedded_store": {"data_dir": folder},
            }
        )
        with local_kelvin(settings) as kelvin:
            tell(said, kelvin.url)
            wait_for_stop()


def serve_on_ray(application: Callable[[], Any], said: Path) -> None:
    """Run what Ray's own users run, until SIGTERM.

    Args:
        application: Makes it, once Ray may be imported.
        said: As of `tell`.
    """
    os.environ["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"] = "1"  # SIGTERM is ours, see local_kelvin
    import ray
    from ray import serve

    port = free_port()
    ray.init(address="local", include_dashboard=False, num_cpus=4)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application())
        tell(said, f"http://127.0.0.1:{port}")
        wait_for_stop()
    finally:
        ray.shutdown()


def _application(name: str, model: str, threads: int) -> Any:
    from loadtest.peer_ray_apps import application

    return application(name, model, threads)


def _serve_fastapi(model: str, threads: int, said: Path) -> None:
    import uvicorn
    from fastapi import FastAPI, Response

    from loadtest.peer_pipelines import call
    from loadtest.peer_ray_apps import as_png, loaded
    from loadtest.peer_settings import PictureAsked

    pipeline = loaded(model, threads)
    one_at_a_time = asyncio.Lock()  # the pipeline's scheduler holds the state of a call
    app = FastAPI()

    @app.get("/imagine")
    async def imagine(prompt: str, steps: int, seed: int, scale: float) -> Response:
        asked = PictureAsked(prompt, seed, 256, steps, scale, 48)
        async with one_at_a_time:
            (picture,) = await asyncio.to_thread(call, pipeline, [asked])
        return Response(as_png([picture])[0], media_type="image/png")

    # Without annotations of a local type, which FastAPI could not find by name.
    imagine.__annotations__ |= {"return": Response}
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        tell(said, f"http://127.0.0.1:{listening.getsockname()[1]}")
        running.run(sockets=[listening])


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.peer_servers")
    parser.add_argument("name", choices=tuple(SERVERS))
    parser.add_argument("--model", required=True, help="plain folder in Diffusers layout")
    parser.add_argument("--said", type=Path, required=True, help="file that gets the URL")
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    try:
        with stoppable():
            if options.name == "kelvin":
                _serve_kelvin(options.said)
            elif options.name == "fastapi":
                _serve_fastapi(options.model, threads, options.said)
            else:
                serve_on_ray(
                    lambda: _application(options.name, options.model, threads), options.said
                )
    except KeyboardInterrupt:
        end_process(0)


if __name__ == "__main__":
    main()
