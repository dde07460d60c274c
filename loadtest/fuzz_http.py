"""Cases over HTTP, made from whatever the service's own OpenAPI document lists.

For each operation: data that fits its schema, data that does not, fitting bodies with values of any
kind in place of others, and requests that are hardly HTTP. Ids of jobs that were accepted go into
later cases, so that jobs are read, followed, cancelled and deleted in every state.
"""

from __future__ import annotations

import json
import random
import re
import shlex
from collections.abc import Callable
from typing import Any, Final

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException
from schemathesis.core.errors import SchemathesisError
from schemathesis.core.failures import FailureGroup
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from loadtest.fuzz_tally import Tally
from loadtest.fuzz_verdict import faults

_CHECKS: Final = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
_TIMEOUT_S = 120.0
_NOT_HTTP = "Invalid HTTP request received."
_KNOWN_JOB = 0.7  # of the cases with a job's id in their path
_JOB_IDS = ("job_id", "prompt_id")
_MOST_JOBS = 64
# Fields that say how much work a picture is, by the names that doors give them: what a case may ask
# for is within schema and sense, or the run would be about pictures. Size and steps beyond sense go
# through, for they are to be refused.
_STEPS = ("num_inference_steps", "steps", "hr_second_pass_steps")
_PICTURES = ("num_images", "n", "n_iter", "batch_size")
_SIDES = ("width", "height")
_MOST_STEPS, _MOST_PICTURES, _LARGEST_SIDE = 6, 2, 64

ANYTHING: Final = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=40)
    | st.sampled_from(["", " ", "\x00", "../..", "%00", "a" * 11_000, "\ud800", "-0", "1e999"])
    | st.sampled_from([0, -1, 10**40, 1e308, 5e-324, 16, 64, 2**31, 2**63, 2**64 - 1]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
"""Any JSON, and what Python's json takes besides: NaN, infinities, lone surrogates."""

# What the client itself would refuse to send.
_NOT_IN_HEADERS: Final = re.compile(rb"[\r\n\x00]|^\s+|\s+$")
_HEADERS: Final = st.dictionaries(
    st.sampled_from(
        [
            "Content-Type",
            "Idempotency-Key",
            "X-Request-Id",
            "Accept",
            "Authorization",
            "Origin",
            "Cookie",
            "Range",
            "traceparent",
            "X-HTTP-Method-Override",
        ]
    ),
    st.binary(max_size=30).map(lambda raw: _NOT_IN_HEADERS.sub(b"", raw))
    | st.sampled_from(
        [b"application/json", b"text/plain", b"bytes=0-0", b"application/json; charset=x"]
    ),
    max_size=3,
)
_BODIES: Final = (
    st.binary(max_size=200)
    | ANYTHING.map(lambda value: _dumped(value))
    | st.integers(1, 3000).map(lambda depth: b"[" * depth)
    | st.integers(1, 3000).map(lambda depth: b'{"prompt":' * depth)
    | st.sampled_from([b"", b"{", b'{"prompt": "a", "prompt": 1}', b"\xef\xbb\xbf{}", b"9" * 5000])
)


class HttpCases:
    """Sends cases to one service.

    Args:
        url: Of it.
        tally: Where they are counted.
    """

    def __init__(self, url: str, tally: Tally) -> None:
        self._url = url
        self._tally = tally
        self._session = requests.Session()
        self._session.trust_env = False
        document = self._session.get(f"{url}/openapi.json", timeout=_TIMEOUT_S).json()
        schema = schemathesis.openapi.from_dict(document)
        self.operations = [found.ok() for found in schema.get_all_operations()]
        self._reports = _reports(document)
        self._draw = random.Random()

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def run(self, number: int, at: int) -> None:
        """Send about so many cases; fewer where there are no more different ones.

        Args:
            number: Of cases.
            at: What all of them follow from.
        """
        self._draw.seed(at)
        weights = {operation.label: _weight(operation) for operation in self.operations}
        strange = max(1, number // 10)
        each = (number - strange) / sum(weights.values())
        for place, operation in enumerate(self.operations):
            share = max(2, round(each * weights[operation.label]))
            self._of_operation(operation, share, at + 1000 * place)
        drawn(self._strange(), strange, at, self._send_strange)

    def _of_operation(self, operation: Any, number: int, at: int) -> None:
        def cases(mode: GenerationMode) -> st.SearchStrategy[Any]:
            strategy: st.SearchStrategy[Any] = operation.as_strategy(generation_mode=mode)
            return strategy

        positive = cases(GenerationMode.POSITIVE)
        kinds: list[tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = [
            (positive, lambda case: self._send(case, "fitting", at)),
            (cases(GenerationMode.NEGATIVE), lambda case: self._send(case, "unfitting", at)),
        ]
        if operation.body:
            changes = st.lists(st.tuples(st.integers(0, 99), ANYTHING), max_size=3)
            kinds += [
                (st.tuples(positive, changes), lambda parts: self._send_changed(at, *parts)),
                (
                    st.tuples(positive, _HEADERS, _BODIES),
                    lambda parts: self._send_raw(at, *parts),
                ),
            ]
        for strategy, use in kinds:
            drawn(strategy, max(1, round(number / len(kinds))), at, use)

    def _send(self, case: Any, kind: str, at: int) -> None:
        self._prepare(case)
        answer = case.call(base_url=self._url, session=self._session, timeout=_TIMEOUT_S)
        found = self._judge(answer, kind, case.operation.label, str(case.formatted_path))
        try:
            case.validate_response(answer, checks=_CHECKS)
        except FailureGroup as group:
            found += [f"{each.title}: {_line(each.message)}" for each in group.exceptions]
        self._blame(answer, case.operation.label, found, at)

    def _send_changed(self, at: int, case: Any, changes: list[tuple[int, Any]]) -> None:
        self._prepare(case)
        names = sorted(_properties(case.operation)) or ["prompt"]
        body = dict(case.body) if isinstance(case.body, dict) else {}
        for place, value in changes:
            body[names[place % len(names)]] = value
        _tame(body)
        self._send_bytes(case, "changed", {"Content-Type": b"application/json"}, _dumped(body), at)

    def _send_raw(self, at: int, case: Any, headers: dict[str, bytes], body: bytes) -> None:
        self._prepare(case)
        self._send_bytes(case, "raw", headers, body, at)

    def _send_bytes(
        self, case: Any, kind: str, headers: dict[str, bytes], body: bytes, at: int
    ) -> None:
        method = case.method.upper()
        answer = self._request(method, case.formatted_path, headers, body)
        found = self._judge(answer, kind, case.operation.label, case.formatted_path)
        self._blame(answer, case.operation.label, found, at)

    def _strange(self) -> st.SearchStrategy[Any]:
        """Return requests that no operation is for: other methods, paths near known ones."""
        pieces = sorted(
            {piece for each in self.operations for piece in each.path.split("/")} - {""}
        )
        piece = st.sampled_from([*pieces, "..", ".", "%2e%2e", "%00", "k", "docs", "static", "~"])
        path = st.lists(piece | st.text(max_size=6), max_size=5)
        methods = st.sampled_from(
            ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "FOO"]
        )
        return st.tuples(methods, path, _HEADERS, st.binary(max_size=20))

    def _send_strange(self, drawn_case: tuple[str, list[str], dict[str, bytes], bytes]) -> None:
        method, pieces, headers, body = drawn_case
        path = "/" + "/".join(requests.utils.quote(each, safe="%~.") for each in pieces)
        answer = self._request(method, path, headers, body)
        found = self._judge(answer, "strange", "no operation", path)
        self._blame(answer, "no operation", found, 0)

    def _request(
        self, method: str, path: str, headers: dict[str, bytes], body: bytes
    ) -> requests.Response:
        prepared = requests.Request(
            method,
            self._url + path,
            headers=headers or None,
            data=body,
        ).prepare()
        return self._session.send(prepared, timeout=_TIMEOUT_S, allow_redirects=False)

    def _prepare(self, case: Any) -> None:
        for name in _JOB_IDS:
            is_there = name in (case.path_parameters or {})
            if is_there and self._tally.jobs and self._draw.random() < _KNOWN_JOB:
                case.path_parameters[name] = self._draw.choice(self._tally.jobs)
        if isinstance(case.body, dict):
            _tame(case.body)

    def _judge(self, answer: Any, kind: str, operation: str, path: str) -> list[str]:
        self._tally.count(kind, operation, str(answer.status_code))
        self._learn(answer)
        request = answer.request
        body = answer.content.decode("utf-8", "replace") if answer.content else ""
        if answer.status_code == 400 and body == _NOT_HTTP:
            return []  # by the web server, before Kelvin: this is no HTTP to it
        method = str(request.method)
        return faults(
            answer.status_code,
            {name: str(value) for name, value in answer.headers.items()},
            body,
            method=method,
            path=path,
            sent=_sent(request),
            is_report=(method.lower(), path, str(answer.status_code)) in self._reports,
        )

    def _learn(self, answer: Any) -> None:
        """Keep the id of a job that was accepted."""
        if answer.status_code not in (200, 202):
            return
        try:
            body = json.loads(answer.content)
        except ValueError:
            return
        for name in ("id", "prompt_id"):
            if isinstance(body, dict) and isinstance(body.get(name), str):
                self._tally.jobs.append(body[name])
        if len(self._tally.jobs) > _MOST_JOBS:
            del self._tally.jobs[self._draw.randrange(_MOST_JOBS)]

    def _blame(self, answer: Any, operation: str, found: list[str], at: int) -> None:
        if found:
            body = (answer.content or b"")[:500].decode("utf-8", "replace")
            told = {"status": answer.status_code, "body": body, "curl": curl(answer.request)}
            self._tally.blame(operation, found, seed=at, **told)


def drawn(
    strategy: st.SearchStrategy[Any], number: int, at: int, use: Callable[[Any], None]
) -> None:
    """Draw so many values and use each; fewer where a strategy has no more, or none at all."""

    @seed(at)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        derandomize=False,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(strategy)
    def run(value: Any) -> None:
        use(value)

    try:
        run()
    except (HypothesisException, SchemathesisError):
        # Nothing unfitting can be said where there is nothing to say.
        return


def curl(request: Any) -> str:
    """Return the command that sends a request again."""
    words = ["curl", "-sS", "-i", "-X", str(request.method)]
    for name, value in request.headers.items():
        told = value if isinstance(value, bytes) else str(value).encode("latin-1", "replace")
        if name.lower() not in ("content-length", "user-agent", "accept-encoding", "connection"):
            words += ["-H", _quoted(name.encode() + b": " + told)]
    body = request.body
    if body:
        words += ["--data-binary", _quoted(body if isinstance(body, bytes) else str(body).encode())]
    return " ".join([*words, shlex.quote(str(request.url))])


def _quoted(data: bytes) -> str:
    """Return bytes as bash takes them: in quotes, or $'...' where they are no printable ASCII."""
    if all(32 <= byte < 127 for byte in data):
        return shlex.quote(data.decode("ascii"))
    told = [
        chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in data
    ]
    return f"$'{''.join(told)}'"


def _reports(document: dict[str, Any]) -> set[tuple[str, str, str]]:
    """Return method, path and status of what answers with a status of failure and is no error."""
    return {
        (method, path, status)
        for path, methods in document["paths"].items()
        for method, told in methods.items()
        for status, answer in told.get("responses", {}).items()
        if status.isdigit() and int(status) >= 400 and "content" in answer
    }


def _weight(operation: Any) -> int:
    if operation.body:
        return 8
    return 3 if operation.path_parameters else 1


def _properties(operation: Any) -> list[str]:
    names: list[str] = []
    for body in operation.body:
        schema = body.definition.get("schema", {}) if isinstance(body.definition, dict) else {}
        names += schema.get("properties", {})
    return names


def _tame(body: dict[str, Any]) -> None:
    for names, most, whole in (
        (_STEPS, _MOST_STEPS, 200),
        (_PICTURES, _MOST_PICTURES, 100),
        (_SIDES, _LARGEST_SIDE, 4096),
    ):
        for name in names:
            value = body.get(name)
            if type(value) is int and most < value <= whole:
                step = 16 if names is _SIDES and value % 16 == 0 else 1
                body[name] = step * (1 + value // step % (most // step))


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _sent(request: Any) -> str:
    body = request.body or b""
    told = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body)
    return "\n".join(
        [
            str(request.url),
            requests.utils.unquote(str(request.url)),
            str(dict(request.headers)),
            told,
        ]
    )


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
