"""Free loopback ports for SeaweedFS, in pairs: its workers find a gRPC port by adding 10 000.

Both halves lie below the range from which Linux and macOS draw ports for outgoing connections, so
a port that is free now is rarely taken a moment later.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Collection

GRPC_OFFSET = 10_000
_FIRST, _LAST = 20_100, 22_700


def is_free(port: int) -> bool:
    """Return whether both halves of the pair can be bound on loopback now."""
    return all(_can_bind(number) for number in (port, port + GRPC_OFFSET))


def free_port(taken: Collection[int]) -> int:
    """Return the lower half of a free pair that is not in `taken`.

    Raises:
        OSError: No pair is free.
    """
    candidates = [port for port in range(_FIRST, _LAST) if port not in taken]
    random.shuffle(candidates)
    for port in candidates:
        if is_free(port):
            return port
    raise OSError("no free pair of loopback ports")


def _can_bind(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a connection in TIME_WAIT does not make a port unusable.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):  # OverflowError: no port number at all
            return False
    return True
