"""Asks an arm of `loadtest.scaling` for pictures over HTTP; sees that they are what was asked."""

from __future__ import annotations

import asyncio
import struct
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from loadtest.lean_http import LeanClient, Reply

_LONGEST_S = 900.0
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Size:
    """Of every picture."""

    side: int
    steps: int
    guidance_scale: float = 4.5
    max_sequence_length: int = 256


class Asker:
    """Asks one arm, each time for a picture with a prompt and a seed that no other has.

    Args:
        is_kelvin: Or a peer, which answers `GET /imagine` with a PNG.
        url: Of its server.
        size: Of every picture.
    """

    def __init__(self, is_kelvin: bool, url: str, size: Size) -> None:
        self._is_kelvin = is_kelvin
        self._url = url
        self._size = size
        self._asked = 0

    def together(self, count: int, steps: int | None = None) -> float:
        """Ask for so many at once; return the seconds until the last was there.

        Args:
            count: Of pictures.
            steps: Of each; the size's own if absent.

        Raises:
            RuntimeError: Something else than a picture of the size came back.
        """
        first = self._asked
        self._asked += count

        async def run() -> float:
            async with LeanClient(self._url) as client, asyncio.timeout(_LONGEST_S):
                began = time.monotonic()
                async with asyncio.TaskGroup() as group:
                    for number in range(first, first + count):
                        group.create_task(self._one(client, number, steps or self._size.steps))
                return time.monotonic() - began

        return asyncio.run(run())

    async def _one(self, client: LeanClient, number: int, steps: int) -> None:
        prompt = f"picture {number} of a lighthouse above a rocky shore in the evening light"
        if self._is_kelvin:
            reply = await client.ask("POST", "/v1/generate", self._body(prompt, number, steps))
            side = _side_told(reply)
        else:
            asked: dict[str, Any] = {"prompt": prompt, "seed": number, "steps": steps}
            asked |= {"scale": self._size.guidance_scale, "side": self._size.side}
            asked |= {"max_sequence_length": self._size.max_sequence_length}
            reply = await client.ask("GET", "/imagine?" + urlencode(asked))
            side = _side_of(reply)
        if side != self._size.side:
            words = reply.body[:300].decode(errors="replace")
            raise RuntimeError(f"no picture of {self._size.side} pixels: {reply.status} {words}")

    def _body(self, prompt: str, seed: int, steps: int) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "seed": seed,
            "num_inference_steps": steps,
            "width": self._size.side,
            "height": self._size.side,
            "guidance_scale": self._size.guidance_scale,
            "max_sequence_length": self._size.max_sequence_length,
            "sampler": "euler",
            "scheduler": "normal",
        }


def _side_told(reply: Reply) -> int:
    return int(reply.json()["images"][0]["width"]) if reply.status == 200 else 0


def _side_of(reply: Reply) -> int:
    if reply.status != 200 or not reply.body.startswith(_PNG):
        return 0
    return int(struct.unpack(">I", reply.body[16:20])[0])  # of the header chunk, its first field
