"""Callers inside the cluster: the Ray Serve handle, through a process that has Ray."""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import gevent
from gevent import subprocess
from gevent.event import AsyncResult

from loadtest.users.exchange import Refused
from loadtest.users.open_loop_user import Drawn, OpenLoopUser


class HandleUser(OpenLoopUser):
    """Calls `generate` and fetches the picture from the object store."""

    door = "handle"
    endpoint = "handle.generate"

    def on_start(self) -> None:
        """Connect before the first request is due; where there is no Ray, say so."""
        self._numbers = itertools.count()
        self._waiting: dict[int, AsyncResult[dict[str, Any]]] = {}
        self._problem = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadtest.handle_caller"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        first = self._process.stdout.readline()
        told = json.loads(first) if first else {"problem": "the process that has Ray ended"}
        if "problem" in told:
            self._problem = told["problem"]
            print(f"handle user skipped: {self._problem}", file=sys.stderr)
            return
        self._listener = gevent.spawn(self._listen)

    def on_stop(self) -> None:
        """Let the process with Ray end."""
        self._process.stdin.close()
        self._process.wait(timeout=10)

    def draw(self, request: dict[str, Any]) -> Drawn:
        """Ask for one picture and wait for it."""
        if self._problem:
            raise Refused("no_handle")
        number = next(self._numbers)
        answer = self._waiting[number] = AsyncResult()
        line = json.dumps({"number": number, "request": request}) + "\n"
        self._process.stdin.write(line.encode())
        self._process.stdin.flush()
        told = answer.get()
        if "error" in told:
            raise Refused(str(told["error"]["code"]))
        result = told["result"]
        picture = self.exchange.fetch(result["images"][0]["url"])
        return Drawn(picture, result["id"], result, is_stored=True)

    def _listen(self) -> None:
        while line := self._process.stdout.readline():
            told = json.loads(line)
            self._waiting.pop(told["number"]).set(told)
        for answer in self._waiting.values():
            answer.set({"error": {"code": "handle_lost"}})
