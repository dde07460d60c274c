"""Cases through the Python handle: what no JSON could say is sent as well."""

from __future__ import annotations

import random
from typing import Any, Final

from hypothesis import strategies as st

from loadtest.fuzz_http import ANYTHING, drawn
from loadtest.fuzz_tally import Tally
from loadtest.fuzz_verdict import handle_faults, insides
from serve.errors import KelvinError
from serve.requests import GenerateRequest

_FITTING: Final = {
    "width": st.sampled_from([16, 32, 64]),
    "height": st.sampled_from([16, 32, 64]),
    "num_inference_steps": st.integers(1, 6),
    "num_images": st.integers(1, 2),
    "guidance_scale": st.floats(0, 20),
    "seed": st.integers(0, 2**64 - 1),
    "sampler": st.sampled_from(["euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde"]),
    "output_format": st.sampled_from(["png", "jpeg", "webp"]),
    "negative_prompt": st.text(max_size=30),
    "guidance_interval": st.tuples(st.floats(0, 1), st.floats(0, 1)),
    "preview_every": st.integers(0, 3),
    "idempotency_key": st.text(
        st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=9
    ),
}
# Beyond JSON: what Python callers pass by mistake.
_OBJECTS: Final = (
    ANYTHING
    | st.binary(max_size=9)
    | st.tuples(st.floats())
    | st.sampled_from([{1, 2}, frozenset(), 1j, object, range(3), ...])
)
_WORK: Final = ("num_inference_steps", "num_images")


def requests_drawn() -> st.SearchStrategy[Any]:
    """Return requests: fitting ones, those with wrong values in places, and no requests at all."""
    fitting = st.fixed_dictionaries({"prompt": st.text(min_size=1, max_size=40)}, optional=_FITTING)
    names = st.sampled_from([*GenerateRequest.model_fields, "tenant", "nothing"])
    wrong = st.dictionaries(names, _OBJECTS, max_size=3)
    changed = st.tuples(fitting, wrong).map(lambda both: _tame(both[0] | both[1]))
    return fitting | changed | changed | _OBJECTS


class HandleCases:
    """Calls one service by handle.

    Args:
        handle: Of it.
        tally: Where cases are counted.
    """

    def __init__(self, handle: Any, tally: Tally) -> None:
        self._handle = handle
        self._tally = tally
        self._draw = random.Random()

    def run(self, number: int, at: int) -> None:
        """Make about so many calls.

        Args:
            number: Of calls.
            at: What all of them follow from.
        """
        self._draw.seed(at)
        asked = st.tuples(
            st.sampled_from(["generate", "submit", "submit"]),
            requests_drawn(),
            st.sampled_from([(), (), ("acme",)]) | st.tuples(_OBJECTS),
        )
        told = st.tuples(
            st.sampled_from(["job", "cancel", "delete", "usage", "jobs"]),
            _OBJECTS,
            st.sampled_from([(), (), ("acme",)]) | st.tuples(_OBJECTS),
        )
        drawn(asked, max(1, number * 2 // 3), at, lambda parts: self._call(at, *parts))
        drawn(told, max(1, number // 3), at + 1, lambda parts: self._call(at, *parts))

    def _call(self, at: int, method: str, argument: Any, tenant: tuple[Any, ...]) -> None:
        known = self._tally.jobs
        if method in ("job", "cancel", "delete") and known and self._draw.random() < 0.6:
            argument = self._draw.choice(known)
        arguments = tenant if method == "usage" else (argument, *tenant)
        name = f"handle.{method}"
        try:
            answer = getattr(self._handle, method).remote(*arguments).result(timeout_s=120)
        except Exception as error:
            answer_told = error.code if isinstance(error, KelvinError) else type(error).__name__
            found = handle_faults(error)
        else:
            answer_told, found = (
                "ok",
                [
                    f"it tells of its insides: {each}"
                    for each in insides(str(answer), repr(arguments))
                ],
            )
            if method == "submit" and not tenant:
                known.append(answer.id)
        self._tally.count("handle", name, answer_told)
        self._tally.blame(name, found, seed=at, call=f"handle.{method}.remote{arguments!r}"[:2000])


def _tame(fields: dict[str, Any]) -> dict[str, Any]:
    for name in _WORK:
        value = fields.get(name)
        if type(value) is int and value > 6:
            fields[name] = value if value > 1000 else 1 + value % 6
    return fields
