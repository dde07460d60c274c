"""Ray nodes with networks of their own: namespaces joined by a bridge, which is in one, too.

Nothing of it is seen outside, so addresses and ports may be the same in every run. Where that is
not permitted nodes are raylets of one host instead, and a node that is cut off is one that stands.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.processes.ownership import (
    MARK,
    NAMESPACES,
    end_all_in,
    end_all_marked,
    is_in,
    mark_of,
    own_name,
    processes,
    remove_leftovers,
    send,
)

_LISTEN = """
import os, socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])), backlog=64)
with socket.socket(fileno=int(sys.argv[3])) as back:
    socket.send_fds(back, [b"x"], [listener.fileno()])
"""


def namespaces_refused() -> str:
    """Return why there can be no network namespaces joined by a bridge; empty: there can."""
    if os.geteuid() != 0:
        return "not root"
    if shutil.which("ip") is None:
        return "no iproute2"
    name = f"{own_name()}-try"
    tries = (
        f"netns add {name}",
        f"netns exec {name} true",
        f"-n {name} link add bridge type bridge",
        f"-n {name} link add one type veth peer name other",
    )
    try:
        for each in tries:
            tried = subprocess.run(["ip", *each.split()], capture_output=True, text=True)
            if tried.returncode:
                return f"ip {each}: {tried.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)
    return ""


class Host:
    """Something with an address of its own, in which processes run."""

    def __init__(self, name: str, address: str, namespace: str | None, switch: str | None) -> None:
        self.address = address
        self.mark = f"{own_name()}/{name}"
        self._namespace = namespace
        self._port_of_switch = (switch, f"to-{name}")

    def popen(
        self, *command: str, environ: Mapping[str, str], output: Path
    ) -> subprocess.Popen[bytes]:
        """Start a Python process here, with its output in a file."""
        inside = ["ip", "netns", "exec", self._namespace] if self._namespace else []
        with output.open("wb") as file:
            return subprocess.Popen(
                [*inside, sys.executable, *command],
                env={**os.environ, **environ, MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT if output.suffix == ".log" else None,
                start_new_session=True,
            )

    def commands(self) -> list[str]:
        """Return the command lines of what runs here."""
        found = []
        for process in processes(self._is_here):
            with suppress(OSError):
                found.append((process / "cmdline").read_bytes().decode(errors="replace"))
        return found

    def _is_here(self, process: Path) -> bool:
        if self._namespace is not None:
            return is_in(process, NAMESPACES / self._namespace)
        return mark_of(process) == self.mark

    def cut_off(self) -> None:
        """Let nothing in or out any more."""
        switch, port = self._port_of_switch
        if switch is None:
            send(signal.SIGSTOP, processes(self._is_here))
        else:
            _ip("-n", switch, "link", "set", port, "down")

    def join_again(self) -> None:
        switch, port = self._port_of_switch
        if switch is not None:
            _ip("-n", switch, "link", "set", port, "up")

    def kill(self) -> None:
        """End all that runs here with SIGKILL; what was started meanwhile, too."""
        if self._namespace is not None:
            end_all_in(NAMESPACES / self._namespace)
        else:
            end_all_marked(self.mark)

    def listening(self, port: int) -> socket.socket:
        """Return a socket that listens here, whoever accepts from it."""
        if self._namespace is None:
            return socket.create_server((self.address, 0), backlog=64)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            command = [sys.executable, "-c", _LISTEN, self.address, str(port), str(theirs.fileno())]
            subprocess.run(
                ["ip", "netns", "exec", self._namespace, *command],
                check=True,
                pass_fds=[theirs.fileno()],
            )
            _, [descriptor], _, _ = socket.recv_fds(ours, 1, 1)
        return socket.socket(fileno=descriptor)


@contextmanager
def hosts(*names: str, apart: bool) -> Iterator[dict[str, Host]]:
    """Give hosts by name; at the end their processes are killed and their networks are gone.

    What a run that was killed has left goes first. One at a time in a process.

    Args:
        names: Of them.
        apart: Each in its own network namespace; else all are this machine.
    """
    remove_leftovers()
    run = own_name()
    made: dict[str, Host] = {}
    with ExitStack() as cleanup:
        switch = None
        if apart:
            switch = f"{run}-switch"
            _new_namespace(switch, cleanup)
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
        for number, name in enumerate(names, start=1):
            if switch is None:
                made[name] = Host(name, "127.0.0.1", None, None)
            else:
                namespace = f"{run}-{name}"
                _new_namespace(namespace, cleanup)
                inside = f"veth peer name eth0 netns {namespace}".split()
                _ip("-n", switch, "link", "add", f"to-{name}", "type", *inside)
                _ip("-n", switch, "link", "set", f"to-{name}", "master", "bridge", "up")
                _ip("-n", namespace, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
                _ip("-n", namespace, "link", "set", "eth0", "up")
                made[name] = Host(name, f"10.77.0.{number}", namespace, switch)
            cleanup.callback(made[name].kill)
        yield made


def _new_namespace(name: str, cleanup: ExitStack) -> None:
    _ip("netns", "add", name)
    cleanup.callback(_ip, "netns", "del", name)
    _ip("-n", name, "link", "set", "lo", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def forwarded(listener: socket.socket, port: int) -> Iterator[None]:
    """Carry what comes to a listening socket to a port of this machine's loopback."""

    def serve() -> None:
        while True:
            try:
                incoming, _ = listener.accept()
            except OSError:
                return
            # One that cannot be carried on must not end the others, nor be waited for by them.
            threading.Thread(target=carry_on, args=(incoming,), daemon=True).start()

    def carry_on(incoming: socket.socket) -> None:
        try:
            outgoing = socket.create_connection(("127.0.0.1", port))
        except OSError:
            incoming.close()
            return
        threading.Thread(target=_carry, args=(incoming, outgoing), daemon=True).start()
        _carry(outgoing, incoming)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _carry(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
