"""Further models as Serve has them: each is an application, named after the service and the model.

Serve's own state is the only record of which models there are, so no list of ours can differ from
what runs, whoever deployed it: `kelvin up`, `kelvin models load` or `serve deploy`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ray import serve
from ray.serve.schema import ApplicationStatusOverview

from serve.errors import ConfigurationError

State = Literal["loading", "loaded", "failed", "unloading"]

_STATES: dict[str, State] = {
    "NOT_STARTED": "loading",
    "DEPLOYING": "loading",
    "RUNNING": "loaded",
    "UNHEALTHY": "loaded",  # some of it may serve; requests are told what does not
    "DEPLOY_FAILED": "failed",
    "DELETING": "unloading",
}


@dataclass(frozen=True)
class ModelState:
    """How things stand with one further model.

    Attributes:
        state: Whether it takes requests.
        deployed_at: When its application was last deployed, by the controller's clock.
        message: Of what failed; empty where nothing did.
    """

    state: State
    deployed_at: float
    message: str = ""


def application_of(service: str, model: str) -> str:
    """Return the name of a model's application.

    Args:
        service: Name of the service's application.
        model: Name of the model.
    """
    return f"{service}.{model}"


def model_states(service: str) -> dict[str, ModelState]:
    """Return name of each further model -> its state. It waits for Serve: not for an event loop.

    Args:
        service: Name of the service's application.
    """
    found: dict[str, ModelState] = {}
    for name, application in serve.status().applications.items():
        if not name.startswith(f"{service}."):
            continue
        state = _STATES.get(application.status, "failed")
        message = _why(application).splitlines()[-1] if state == "failed" else ""
        model = name.removeprefix(f"{service}.")
        found[model] = ModelState(state, application.last_deployed_time_s, message)
    return found


def is_running(name: str) -> bool:
    """Return whether an application is up; it waits for Serve.

    Raises:
        ConfigurationError: It does not start, and why.
    """
    app = serve.status().applications.get(name)
    if app is not None and app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
        whole = _why(app)
        raise ConfigurationError(
            f"The application does not start: {whole.splitlines()[-1]}",
            allowed="`kelvin doctor` says what this machine lacks",
        ) from RuntimeError(whole)
    return app is not None and app.status == "RUNNING"


def is_deleted(name: str) -> bool:
    """Return whether an application is going or gone; it waits for Serve."""
    app = serve.status().applications.get(name)
    return app is None or app.status == "DELETING"


def _why(application: ApplicationStatusOverview) -> str:
    """Return why an application failed: tracebacks, whose last line is what a person needs."""
    said = [application.message, *(each.message for each in application.deployments.values())]
    return "\n".join(filter(None, said)).strip() or "Serve does not say why."
