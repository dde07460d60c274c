"""Loading and unloading further models of a running service, by whoever may reach its Ray.

The service's Pipeline and the other models are neither restarted nor asked to wait: what is loaded
is an application beside them, and what is unloaded finishes first.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.serve.api import RunTarget

from serve.admin_turn import admin_turn
from serve.app import APP_NAME, model_application
from serve.config import ModelEntry, Settings
from serve.errors import ConfigurationError, KelvinError, ModelConflict
from serve.further_models import ModelFacts, further_model, refuse_taken_pools
from serve.local_ray import check_resources, reserved_by
from serve.model_applications import application_of, is_running, model_states
from serve.models import model_not_found
from serve.stage_errors import typed_error

_ANSWER_WITHIN_S = 30.0
_POLL_S = 1.0
_KNOCK_WITHIN_S = 5.0
# A Pipeline that is not told again for so long takes requests anew: whoever unloads may die.
_CLOSED_FOR_S = 15.0

Tell = Callable[[str], None]


class ModelAdmin:
    """Loads and unloads models of the service that runs on the Ray that this process has joined.

    Args:
        tell: Takes a sentence for a person now and then.

    Raises:
        ConfigurationError: No service runs there.
    """

    def __init__(self, tell: Tell = lambda _: None) -> None:
        self._tell = tell
        try:
            self._service = serve.get_app_handle(APP_NAME)
        except serve.exceptions.RayServeException:
            raise ConfigurationError(
                "No Kelvin runs on this Ray.",
                field="RAY_ADDRESS",
                value=os.environ.get("RAY_ADDRESS"),
                allowed="the Ray of a running `kelvin up` or of a cluster that serves Kelvin",
            ) from None

    def settings(self) -> Settings:
        """Return the service's settings."""
        found: Settings = self._ask("shared_settings")
        return found

    def load(self, entry: ModelEntry, wait_s: float) -> dict[str, Any]:
        """Load a model and return what it is, once it takes requests.

        Args:
            entry: Its settings.
            wait_s: Seconds to wait for its replicas; it goes on loading after that.

        Raises:
            ConfigurationError: Its files or pools do not fit, or it does not start; nothing of it
                stays, and the service is as it was.
            ModelConflict: It is there already, another loads or unloads it, or it is not ready in
                time.
        """
        facts = further_model(self.settings(), entry)
        with admin_turn(facts.spec.name):
            return self._load(facts, wait_s)

    def _load(self, facts: ModelFacts, wait_s: float) -> dict[str, Any]:
        name = facts.spec.name
        application = application_of(APP_NAME, name)
        self._refuse_if_there(name)
        refuse_taken_pools(facts, self._ask("pool_names"))
        own = [pool for pools in facts.own_pools.values() for pool in pools]
        check_resources(reserved_by(own), ray.available_resources())
        self._tell(f"Loading {name}: {_pools_in_words(facts)} ...")
        target = RunTarget(model_application(facts), name=application, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)
        deadline = time.monotonic() + wait_s
        try:
            while not is_running(application):
                if time.monotonic() >= deadline:
                    raise ModelConflict(
                        f"Model {name!r} is still loading after {wait_s:g} s, and goes on.",
                        field="model",
                        value=name,
                        allowed="`kelvin models list` says when it is loaded, or unload it",
                    )
                time.sleep(_POLL_S)
        except ConfigurationError:
            serve.delete(application)
            raise
        self._broadcast("reopen_model", name)
        return next(each for each in self._ask("models") if each["name"] == name)

    def unload(self, name: str, wait_s: float) -> None:
        """Unload a model once its jobs are done; new ones are refused from now on.

        Args:
            name: Of the model.
            wait_s: Seconds to wait for its jobs.

        Raises:
            ModelNotFound: There is none of that name.
            ModelConflict: It is the service's own, another loads or unloads it, or its jobs did not
                end in time: then it takes requests again.
        """
        with admin_turn(name):
            self._unload(name, wait_s)

    def _unload(self, name: str, wait_s: float) -> None:
        known = [each["name"] for each in self._ask("models")]
        if name not in model_states(APP_NAME):
            self._broadcast("close_model", name, 0.0)  # says so of the service's own
            raise model_not_found(name, known)
        deadline = time.monotonic() + wait_s
        while running := sum(self._broadcast("close_model", name, _CLOSED_FOR_S)):
            if time.monotonic() >= deadline:
                self._broadcast("reopen_model", name)
                raise ModelConflict(
                    f"{running} jobs of model {name!r} still run after {wait_s:g} s.",
                    field="model",
                    value=name,
                    allowed="more seconds; it takes requests again",
                )
            self._tell(f"Waiting for {running} jobs of {name} ...")
            time.sleep(_POLL_S)
        serve.delete(application_of(APP_NAME, name))
        self._broadcast("reopen_model", name)  # they ask Serve, which has it no more

    def _refuse_if_there(self, name: str) -> None:
        known = {each["name"]: each["state"] for each in self._ask("models")}
        state = known.get(name)
        if state == "failed":
            serve.delete(application_of(APP_NAME, name))
        elif state is not None:
            raise ModelConflict(
                f"Model {name!r} is there already: {state}.",
                field="model",
                value=name,
                allowed="another name (model.name), or unload it first",
            )

    def _ask(self, method: str) -> Any:
        try:
            return getattr(self._service, method).remote().result(timeout_s=_ANSWER_WITHIN_S)
        except Exception as error:
            raise _typed(error) from None

    def _broadcast(self, method: str, *arguments: Any) -> list[Any]:
        try:
            answers: list[Any] = self._service.broadcast(method, *arguments).results(
                timeout_s=_ANSWER_WITHIN_S
            )
        except Exception as error:
            raise _typed(error) from None
        return answers


def join_ray() -> None:
    """Join the Ray that RAY_ADDRESS names, else the one on this machine, if not joined yet.

    Raises:
        ConfigurationError: There is none, or it does not let us in.
    """
    if ray.is_initialized():
        return
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # It warns that the cluster is protected by a token, which is as it should be.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        _knock(address)
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigurationError(
            f"No Ray can be joined: {reason}",
            field="RAY_ADDRESS",
            value=address,
            allowed="the address of the Ray that serves Kelvin; on the machine of `kelvin up` it "
            "is found without",
        ) from error


def _knock(address: str) -> None:
    """Raise OSError if nobody answers at HOST:PORT: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_WITHIN_S).close()


def _pools_in_words(facts: ModelFacts) -> str:
    own = ", ".join(pool.name for pools in facts.own_pools.values() for pool in pools)
    shared = " and ".join(sorted(facts.shared))
    return f"{own}; {shared} by the service's own pools, same files" if shared else own


def _typed(error: Exception) -> KelvinError:
    return typed_error(error, "pipeline")
