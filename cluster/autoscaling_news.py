"""What the plan decided, carried from Serve's controller to whoever shows it.

The plan runs inside Serve's controller, which asks for a number and takes no words; `/v1/status`
is answered by Pipelines, elsewhere in the cluster. Between them lies Ray's own key-value store (of
its GCS): every process of the cluster reaches it without being told an address, it is gone with the
cluster, and a few hundred bytes that change a few times a minute are what it is for. An actor for
this would be one more process, and Serve's long polling is private to Serve. A thread writes, so
that the controller's loop never waits; what is not written in time is overtaken by what is newer.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from cluster.complaints import Complaints

_NAMESPACE = b"kelvin"
_log = logging.getLogger("ray.serve")

Write = Callable[[str, bytes], None]


class NewsWriter:
    """Keeps the newest snapshot of one application written; a daemon thread, started on first use.

    Args:
        application: Whose.
        write: Puts bytes under a name; Ray's store if None.
        also: Called with each snapshot, by the same thread; for gauges.
    """

    def __init__(
        self,
        application: str,
        write: Write | None = None,
        also: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._application = application
        self._write = write or _write_to_ray
        self._also = also
        self._changed = threading.Condition()
        self._newest: Mapping[str, Any] | None = None
        self._thread: threading.Thread | None = None
        self._complaints = Complaints(_log)

    def put(self, snapshot: Mapping[str, Any]) -> None:
        """Have a snapshot written soon; never waits.

        Args:
            snapshot: What JSON can say; not to be changed any more.
        """
        with self._changed:
            self._newest = snapshot
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="kelvin-autoscaling-news", daemon=True
                )
                self._thread.start()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None)
                snapshot, self._newest = self._newest, None
            if snapshot is None:
                continue
            try:
                self._write(self._application, json.dumps(snapshot).encode())
                if self._also is not None:
                    self._also(snapshot)
            except Exception as error:
                # The next snapshot is a second away, and the plan goes on without being shown.
                self._complaints.about(error, "the autoscaler's decisions cannot be told")


def read_news(application: str) -> dict[str, Any] | None:
    """Return the newest snapshot of an application; None: none was written, or Ray is away.

    It may wait for Ray: not for an event loop.
    """
    from ray.experimental import internal_kv

    try:
        if not internal_kv._internal_kv_initialized():
            return None
        found = internal_kv._internal_kv_get(_key(application), namespace=_NAMESPACE)
        snapshot = None if found is None else json.loads(found)
    except Exception:
        # Ray's own errors, of many classes; who asks for the status wants all the rest of it.
        _log.exception("the autoscaler's decisions cannot be read")
        return None
    return snapshot if isinstance(snapshot, dict) else None


def _write_to_ray(application: str, data: bytes) -> None:
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(_key(application), data, overwrite=True, namespace=_NAMESPACE)


def _key(application: str) -> bytes:
    return f"autoscaling/{application}".encode()
