"""Everything on this machine: the embedded store, Ray, Serve and the application, and its end.

What `kelvin up`, `kelvin demo` and the tests start. With `RAY_ADDRESS` set, the application goes to
that cluster instead and only the application is removed at the end.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import math
import os
import shutil
import socket
import tempfile
import time
from contextlib import ExitStack
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import ray
from ray import serve
from ray.serve.api import RunTarget

from serve import telemetry
from serve.config import Settings
from serve.embedded_store import EmbeddedStore
from serve.environment import exported
from serve.errors import ConfigurationError, StorageUnavailable
from serve.storage import ObjectStore

# What passes through it at once is some embeddings and pictures, a few MiB each.
_OBJECT_STORE_BYTES = 256 << 20
_POLL_S = 0.25
_BETWEEN_STATUS_S = 3.0
_READY_ANSWER_S = 15.0

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}


class LocalKelvin:
    """A running Kelvin; a context manager.

    Args:
        settings: Port 0 takes a free one. Without a storage endpoint the embedded store is
            started, unless that is disabled: then it is AWS.

    Raises:
        ConfigurationError: On start: the model, the machine or the settings do not fit.
        StorageUnavailable: On start: the store that is set does not do what Kelvin needs.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._cleanup = ExitStack()

    @property
    def url(self) -> str:
        """Base URL of the front doors."""
        host = self.settings.http.host
        reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{self._port}"

    @property
    def _port(self) -> int:
        return self.settings.http.port

    def start(self) -> None:
        """Start everything and return when requests are taken; on failure nothing stays."""
        try:
            self._choose_port()
            self._start_store()
            self._start_ray()
            self._start_app()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop every process that was started; calling it twice does no harm."""
        self._cleanup.close()

    def __enter__(self) -> LocalKelvin:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _choose_port(self) -> None:
        if self._port == 0:
            http = self.settings.http.model_copy(
                update={"port": _free_port(self.settings.http.host)}
            )
            self.settings = self.settings.model_copy(update={"http": http})

    def _start_store(self) -> None:
        embedded = self.settings.embedded_store
        if self.settings.storage.endpoint_url is None and embedded.enabled:
            store = EmbeddedStore(embedded.data_dir, self.settings.storage.bucket)
            self._cleanup.enter_context(store)
            storage = store.storage_settings(self.settings.storage)
            self.settings = self.settings.model_copy(update={"storage": storage})
        else:
            _probe(self.settings)

    def _start_ray(self) -> None:
        self._cleanup.enter_context(exported(telemetry.environment(self.settings)))
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        # It warns that a new cluster is protected by a token, which is as it should be.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        if not _joins_cluster():
            self._cleanup.enter_context(exported(_QUIET))
            # Unix sockets below this folder must stay under 107 characters.
            folder = tempfile.mkdtemp(prefix="kelvin-", dir="/tmp")
            self._cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
            options |= {
                "num_cpus": max(os.cpu_count() or 1, math.ceil(_planned(self.settings)[0])),
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_temp_dir": folder,
            }
        self._cleanup.callback(ray.shutdown)
        ray.init(**options)
        _check_resources(self.settings)

    def _start_app(self) -> None:
        from serve.app import APP_NAME, build

        app = build(self.settings)
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": self.settings.http.host, "port": self._port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        if _joins_cluster():
            self._cleanup.callback(serve.delete, APP_NAME)
        target = RunTarget(app, name=APP_NAME, route_prefix="/")
        serve.run_many([target], wait_for_applications_running=False)
        self._wait_until_running(APP_NAME)

    def _wait_until_running(self, name: str) -> None:
        # Serve's own status costs 40 ms of CPU a call and as much in the controller, which is busy
        # starting us: so the front door is asked often and Serve seldom, until the door opens.
        asked_serve = -math.inf
        while True:
            is_open = _joins_cluster() or _answers_ready(self.url)
            if is_open or time.monotonic() - asked_serve > _BETWEEN_STATUS_S:
                if _is_running(name):
                    return
                asked_serve = time.monotonic()
            time.sleep(_POLL_S)


def _answers_ready(url: str) -> bool:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(
        parts.hostname or "", parts.port, timeout=_READY_ANSWER_S
    )
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _is_running(name: str) -> bool:
    app = serve.status().applications.get(name)
    if app is not None and app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
        reasons = [app.message, *(deployment.message for deployment in app.deployments.values())]
        raise ConfigurationError(
            "The application does not start: " + " ".join(filter(None, reasons)),
            allowed="`kelvin doctor` says what this machine lacks",
        )
    return app is not None and app.status == "RUNNING"


def _joins_cluster() -> bool:
    return bool(os.environ.get("RAY_ADDRESS"))


def _probe(settings: Settings) -> None:
    store = ObjectStore(settings.storage)
    try:
        checks = asyncio.run(store.probe())
    finally:
        store.close()
    for check in checks:
        if not check.ok:
            raise StorageUnavailable(
                f"Object store, {check.name}: {check.detail}",
                field="storage",
                value=settings.storage.endpoint_url or "AWS",
                allowed=check.remedy,
            )


def _planned(settings: Settings) -> tuple[float, float]:
    """Return the CPUs and GPUs that the settings reserve."""
    pools = (*settings.text_encoder, *settings.denoiser, *settings.vae_decoder)
    cpus = sum(pool.num_replicas * pool.num_cpus for pool in pools)
    gpus = sum(pool.num_replicas * pool.num_gpus for pool in pools)
    return cpus + settings.pipeline.num_replicas * settings.pipeline.num_cpus, gpus


def _check_resources(settings: Settings) -> None:
    """Refuse a plan that could never be placed; Serve would wait for ever."""
    present = ray.cluster_resources()
    for resource, planned in zip(("CPU", "GPU"), _planned(settings), strict=True):
        if planned > present.get(resource, 0.0):
            raise ConfigurationError(
                f"The pools reserve {planned:g} {resource}s; there are "
                f"{present.get(resource, 0.0):g}.",
                field=f"num_{resource.lower()}s",
                value=planned,
                allowed=f"at most {present.get(resource, 0.0):g} over all replicas",
            )


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])
