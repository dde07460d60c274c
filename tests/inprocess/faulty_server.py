"""Servers that fail in chosen ways, on free loopback ports: for what a healthy store never does."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_Handler = Callable[[socket.socket, int], None]


@contextmanager
def serving(handle: _Handler) -> Iterator[str]:
    """Serve each connection in a thread of its own with `handle(connection, number)`; yield URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            threading.Thread(
                target=handle, args=(connection, len(connections) - 1), daemon=True
            ).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for open_socket in (listener, *connections):
            # Closing alone does not wake a thread that waits in accept or recv.
            with suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)
            open_socket.close()


def answering(status: int, body: str = "", headers: str = "") -> _Handler:
    """Answer the first request of every connection with this and close."""

    def handle(connection: socket.socket, _: int) -> None:
        request = read_message(connection)
        content = b"" if request.startswith(b"HEAD ") else body.encode()
        connection.sendall(
            f"HTTP/1.1 {status} X\r\n{headers}Content-Length: {len(body.encode())}\r\n"
            "Connection: close\r\n\r\n".encode()
            + content
        )
        connection.close()

    return handle


def silent(connection: socket.socket, _: int) -> None:
    """Accept, read and never answer."""
    while connection.recv(65_536):
        pass


def losing_first_answers(endpoint_url: str, lost: int) -> _Handler:
    """Pass each connection's first request on, but lose the answers to the first `lost` of them."""
    host, port = endpoint_url.removeprefix("http://").split(":")

    def handle(connection: socket.socket, number: int) -> None:
        request = read_message(connection)
        with socket.create_connection((host, int(port))) as upstream:
            upstream.sendall(request)
            answer = read_message(upstream, head_only=request.startswith(b"HEAD "))
        if number >= lost:
            connection.sendall(answer)
        connection.close()

    return handle


def passing_on(endpoint_url: str, is_open: threading.Event, instead: bytes = b"") -> _Handler:
    """Pass requests on; while shut, answer with `instead` and hang up."""
    host, port = endpoint_url.removeprefix("http://").split(":")

    def handle(connection: socket.socket, _: int) -> None:
        # A client that has given up is none of our business.
        with suppress(OSError):
            while request := read_message(connection):
                if not is_open.is_set():
                    connection.sendall(instead)
                    break
                with socket.create_connection((host, int(port))) as upstream:
                    upstream.sendall(request)
                    answer = read_message(upstream, head_only=request.startswith(b"HEAD "))
                connection.sendall(answer)
            connection.close()

    return handle


def ignoring_conditions() -> _Handler:
    """Behave as a store that takes every PUT: what rclone and others do with If-None-Match."""
    objects: dict[bytes, bytes] = {}

    def handle(connection: socket.socket, _: int) -> None:
        head, body = read_message(connection).split(b"\r\n\r\n", 1)
        method, path = head.split(b" ")[:2]
        answer = b""
        if method == b"PUT":
            objects[path] = body
        elif method == b"DELETE":
            objects.pop(path, None)
        elif b"list-type" in path:
            listed = "".join(
                f"<Contents><Key>{key.decode().removeprefix('/kelvin/')}</Key></Contents>"
                for key in objects
            )
            answer = f"<ListBucketResult><Name>kelvin</Name>{listed}</ListBucketResult>".encode()
        else:
            answer = objects.get(path, b"")
        connection.sendall(
            b'HTTP/1.1 200 OK\r\nConnection: close\r\nETag: "x"\r\nContent-Length: %d\r\n\r\n'
            % len(answer)
            + answer
        )
        connection.close()

    return handle


def read_message(connection: socket.socket, *, head_only: bool = False) -> bytes:
    """Read one HTTP message: its head and as many bytes as its Content-Length says."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(65_536)
        if not chunk:
            return data
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    if b"100-continue" in head.lower():
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = b"\r\n".join(
            line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:")
        )
    wanted = 0
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            wanted = int(line.split(b":")[1])
    while len(body) < wanted and not head_only:
        body += connection.recv(65_536)
    return head + b"\r\n\r\n" + body
