"""Everything on this machine: the embedded store, Ray, Serve and the application, and its end.

What `kelvin up`, `kelvin demo` and the tests start. With `RAY_ADDRESS` set, the application goes to
that cluster instead and only the application is removed at the end.
"""

from __future__ import annotations

import asyncio
import http.client
import math
import socket
import time
from contextlib import ExitStack
from types import TracebackType
from urllib.parse import urlsplit

import ray
from ray import serve
from ray.serve.api import RunTarget

from serve.card_fit import refuse_what_cannot_fit
from serve.config import Settings
from serve.embedded_store import EmbeddedStore
from serve.errors import ConfigurationError, StorageUnavailable
from serve.exposure import refuse_open_door
from serve.further_models import ModelFacts, further_models
from serve.key_store import KEYS_FILE
from serve.local_ray import joins_cluster, running_ray
from serve.model_applications import application_of, is_running, model_states
from serve.model_dir import model_name, resolve_model_dir
from serve.models import ModelSpec
from serve.storage_probe import probe_stores

_POLL_S = 0.25
_BETWEEN_STATUS_S = 3.0
_BETWEEN_FURTHER_S = 1.0
_READY_ANSWER_S = 15.0


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
        self._embedded: EmbeddedStore | None = None
        self._further: tuple[ModelFacts, ...] = ()

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
            refuse_open_door(self.settings)
            self._further = further_models(self.settings, _own_name(self.settings))
            own = (self.settings.model, self.settings.pools)
            refuse_what_cannot_fit(
                [own, *((each.settings.model, each.own_pools) for each in self._further)]
            )
            self._cleanup.enter_context(running_ray(self.settings, self._further))
            self._check_reach_of_store()
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
        if self.settings.uses_embedded_store:
            store = EmbeddedStore(embedded.data_dir, self.settings.storage.bucket)
            self._cleanup.enter_context(store)
            self._embedded = store
            storage = store.storage_settings(self.settings.storage)
            keys = self.settings.keys
            if keys.file is None:
                keys = keys.model_copy(update={"file": str(store.data_dir / KEYS_FILE)})
            update = {"storage": storage, "keys": keys}
            self.settings = self.settings.model_copy(update=update)
        if self._embedded is None or self.settings.journal.storage is not None:
            _probe(self.settings)

    def _check_reach_of_store(self) -> None:
        """Refuse a store on this machine's loopback for stages on other machines."""
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())
        if self._embedded is not None and nodes > 1:
            raise ConfigurationError(
                f"The cluster has {nodes} nodes, and the embedded store is reached from this one "
                "alone.",
                field="storage.endpoint_url",
                allowed="an S3 endpoint that every node reaches",
            )

    def _start_app(self) -> None:
        from serve.app import APP_NAME, build, model_application

        app = build(self.settings.model_copy(update={"models": ()}))
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": self.settings.http.host, "port": self._port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        if joins_cluster():
            self._cleanup.callback(_delete, APP_NAME)
        targets = [RunTarget(app, name=APP_NAME, route_prefix="/")]
        for facts in self._further:
            name = application_of(APP_NAME, facts.spec.name)
            targets.append(RunTarget(model_application(facts), name=name, route_prefix=None))
        serve.run_many(targets, wait_for_applications_running=False)
        self._wait_until_running(APP_NAME)
        for target in targets[1:]:
            while not is_running(target.name):
                time.sleep(_BETWEEN_FURTHER_S)

    def _wait_until_running(self, name: str) -> None:
        # Serve's own status costs 40 ms of CPU a call and as much in the controller, which is busy
        # starting us: so the front door is asked often and Serve seldom, until the door opens.
        asked_serve = -math.inf
        while True:
            is_open = joins_cluster() or _answers_ready(self.url)
            if is_open or time.monotonic() - asked_serve > _BETWEEN_STATUS_S:
                if is_running(name):
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


def _own_name(settings: Settings) -> str:
    folder = resolve_model_dir(settings.model, weights=False)
    return ModelSpec.from_directory(folder, model_name(settings.model)).name


def _delete(service: str) -> None:
    """Take the service out of a cluster that stays, and every further model with it."""
    for model in model_states(service):
        serve.delete(application_of(service, model))
    serve.delete(service)


def _probe(settings: Settings) -> None:
    for check in asyncio.run(probe_stores(settings)):
        if not check.ok:
            raise StorageUnavailable(
                f"Object store, {check.name}: {check.detail}",
                field="storage",
                value=settings.storage.endpoint_url or "AWS",
                allowed=check.remedy,
            )


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])
