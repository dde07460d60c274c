"""HTTP as locust's fast users speak it, without counting each exchange as a request of its own.

One picture takes several exchanges; what locust counts is the picture (`open_loop_user`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from locust.contrib.fasthttp import FastHttpSession
from locust.event import EventHook

_MOST_AT_ONCE = 10_000
_TIMEOUT_S = 300.0
_CONNECT_S = 10.0


class Refused(Exception):
    """No picture: the code of a typed error or what else is wrong, and the status."""

    def __init__(self, code: str, status: int = 0) -> None:
        super().__init__(f"{code} ({status})" if status else code)
        self.code = code
        self.status = status


@dataclass(frozen=True)
class Reply:
    """What came back, of a status below 400."""

    status: int
    headers: Any
    body: bytes

    def json(self) -> Any:
        """Return the body; Refused: it is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise Refused("not_json", self.status) from None


class Exchange:
    """Talks to one service and to its object store; any number of greenlets at a time.

    Args:
        url: Base URL of the service.
        api_key: Where it asks for one; the store never sees it.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        self.authorization: dict[str, str] = (
            {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        )
        self._session = FastHttpSession(
            base_url=url,
            request_event=EventHook(),
            user=None,
            insecure=False,
            concurrency=_MOST_AT_ONCE,
            network_timeout=_TIMEOUT_S,
            connection_timeout=_CONNECT_S,
        )

    def ask(self, method: str, path: str, body: Any = None) -> Reply:
        """Send one request to the service; `body` is sent as JSON.

        Raises:
            Refused: It was answered by an error, or not at all.
        """
        return self._reply(method, path, self.authorization, body)

    def fetch(self, url: str) -> bytes:
        """Return what the object store has at a presigned URL.

        Raises:
            Refused: `store: ...`.
        """
        try:
            return self._reply("GET", url, {}).body
        except Refused as refused:
            raise Refused(f"store: {refused.code}", refused.status) from None

    def _reply(self, method: str, url: str, headers: dict[str, str], body: Any = None) -> Reply:
        response = self._session.request(method, url, headers=headers, json=body)
        status = int(response.status_code or 0)
        if status == 0:
            error = getattr(response, "error", None)
            raise Refused(f"connection: {type(error).__name__}")
        content = response.content or b""
        if status >= 400:
            raise Refused(_code_in(content, status), status)
        return Reply(status, response.headers, content)


def _code_in(content: bytes, status: int) -> str:
    try:
        told = json.loads(content)["error"]
        code = told.get("code") or told.get("type")
        return str(code) if code else f"http_{status}"
    except (ValueError, KeyError, TypeError, AttributeError):
        # Serve's proxy refuses in plain text.
        return "proxy_overloaded" if status == 429 else f"http_{status}"
