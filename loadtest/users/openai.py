"""Callers with OpenAI's client: `POST /v1/images/generations`, the picture in the answer."""

from __future__ import annotations

import base64
from typing import Any

from loadtest.users.open_loop_user import Drawn, OpenLoopUser


class OpenAIUser(OpenLoopUser):
    """Asks and waits; what the answer holds must be what the store holds."""

    door = "openai"
    endpoint = "POST /v1/images/generations"

    def draw(self, request: dict[str, Any]) -> Drawn:
        """Ask for one picture and wait for it."""
        fields = dict(request)
        size = f"{fields.pop('width')}x{fields.pop('height')}"
        body = {**fields, "size": size, "response_format": "b64_json"}
        reply = self.exchange.ask("POST", "/v1/images/generations", body)
        picture = base64.b64decode(reply.json()["data"][0]["b64_json"])
        return Drawn(picture, reply.headers["x-kelvin-job-id"], is_stored=True)
