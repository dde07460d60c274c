"""Callers of `POST /v1/generate`, who fetch their picture from the object store."""

from __future__ import annotations

from typing import Any

from loadtest.users.open_loop_user import Drawn, OpenLoopUser


class NativeUser(OpenLoopUser):
    """Asks, waits, and fetches."""

    door = "native"
    endpoint = "POST /v1/generate"

    def draw(self, request: dict[str, Any]) -> Drawn:
        """Ask for one picture and wait for it."""
        result = self.exchange.ask("POST", "/v1/generate", request).json()
        picture = self.exchange.fetch(result["images"][0]["url"])
        return Drawn(picture, result["id"], result, is_stored=True)
