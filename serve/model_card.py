"""The deployment at the head of a further model's application: it knows the model, and no weights.

A Serve application needs an ingress. This one tells each Pipeline what the model is and where its
pools are, so that nothing of it is kept anywhere else: with the application the model is gone.
"""

from __future__ import annotations

from typing import Any

from ray import serve

from serve.errors import ConfigurationError
from serve.further_models import ModelFacts


class ModelCard:
    """Plain class; the builder makes it a deployment.

    Args:
        facts: Of the model.
        pools: Handles of its own pools. They are not used here: what an ingress is bound to is what
            Serve deploys with it.

    Raises:
        ConfigurationError: The application has not the name under which it would be found.
    """

    def __init__(self, facts: ModelFacts, pools: tuple[Any, ...]) -> None:
        self._facts = facts
        application = serve.get_replica_context().app_name
        if not application.endswith(f".{facts.spec.name}"):
            raise ConfigurationError(
                f"The application {application!r} serves model {facts.spec.name!r}.",
                field="name",
                value=application,
                allowed=f"the service's name, a dot and the model's: kelvin.{facts.spec.name}",
            )

    def describe(self) -> ModelFacts:
        """Return what the model is."""
        return self._facts
