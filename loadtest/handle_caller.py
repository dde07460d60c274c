"""Calls a Kelvin by its Ray Serve handle for somebody who cannot: lines of JSON in and out.

Locust patches sockets and threads for gevent, and Ray's client lives on both; so the handle user's
calls are made in this process. A line in is `{"number": n, "request": {...}}`; one out is
`{"number": n, "result": {...}}` or `{"number": n, "error": {...}}`, in the order in which they end.
The first line out is `{"problem": "why no handle can be had"}`, or which Kelvin this one is: its
`store`, where two services cannot have the same.

    python -m loadtest.handle_caller --probe    # only that line
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any, TextIO

from serve.commands.output import stdout_is_for_json, write_json
from serve.errors import KelvinError, StageUnavailable

APPLICATION = "kelvin"
_STATUS_S = 20.0


def main() -> int:
    """Speak until standard input ends; exit 1 where there is no handle."""
    with stdout_is_for_json() as stdout:
        try:
            handle = _handle()
            store = handle.status.remote().result(timeout_s=_STATUS_S)["storage"]
        except Exception as error:  # Ray has many ways of saying that it is not there
            words = str(error).strip().split(". ")[0].splitlines()
            write_json({"problem": words[0] if words else type(error).__name__}, stdout)
            return 1
        write_json({"store": store}, stdout)
        if "--probe" not in sys.argv[1:]:
            asyncio.run(_speak(handle, stdout))
        stdout.flush()
    # Ray's shutdown takes seconds for which nobody waits.
    os._exit(0)


def _handle() -> Any:
    import ray
    from ray import serve

    ray.init("auto", log_to_driver=False, logging_level="ERROR", configure_logging=False)
    return serve.get_app_handle(APPLICATION)


async def _speak(handle: Any, stdout: TextIO) -> None:
    tasks: set[asyncio.Task[None]] = set()
    reader = asyncio.StreamReader(limit=1 << 20)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        task = loop.create_task(_call(handle, json.loads(line), stdout))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


async def _call(handle: Any, asked: dict[str, Any], stdout: TextIO) -> None:
    from serve.requests import GenerateRequest

    try:
        result = await handle.generate.remote(GenerateRequest(**asked["request"]))
        told = {"result": result.model_dump(mode="json")}
    except KelvinError as error:
        told = error.body()
    except Exception as error:  # Ray's own, of a replica that died
        told = StageUnavailable(type(error).__name__).body()
    write_json({"number": asked["number"], **told}, stdout)


if __name__ == "__main__":
    sys.exit(main())
