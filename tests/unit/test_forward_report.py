"""The status of a denoiser names its forwards as people do and says how each runs."""

import json
from dataclasses import replace

from deployments.forward_report import bucket_label, report_decoding, report_forwards
from deployments.replica import ReplicaStatus
from deployments.sd3.compiled_decode import Prepared
from deployments.step_costs import StepCosts, TokenShape

SQUARE = TokenShape(128, 128, 333)
WIDE = TokenShape(64, 128, 333)


class Model:
    def path(self, height: int, width: int, text_tokens: int, rows: int) -> str:
        return "graph" if rows == 2 else "eager"

    def attention_backend(self, height: int, width: int, text_tokens: int, rows: int) -> str:
        return "cudnn" if height == 128 else "flash"


def _costs(*observed: tuple[TokenShape, int, float]) -> StepCosts:
    costs = StepCosts()
    for shape, rows, seconds in observed:
        costs.observe(shape, rows, seconds)
    return costs


def test_every_measured_forward_is_reported():
    costs = _costs((SQUARE, 2, 0.0841), (SQUARE, 1, 0.0452), (WIDE, 2, 0.04))
    report = report_forwards(costs.as_json(), Model())
    assert report["measured_ms"] == {
        "1024x1024 x2 rows": 84.1,
        "1024x1024 x1 row": 45.2,
        "1024x512 x2 rows": 40.0,
    }
    assert report["path"]["1024x1024 x1 row"] == "eager"
    assert report["path"]["1024x1024 x2 rows"] == "graph"
    assert report["attention"]["1024x512 x2 rows"] == "flash"


def test_lengths_of_text_are_told_apart_where_they_differ():
    costs = _costs((SQUARE, 2, 0.08), (TokenShape(128, 128, 154), 2, 0.07))
    report = report_forwards(costs.as_json(), Model())
    assert set(report["measured_ms"]) == {
        "1024x1024 x2 rows, 333 text tokens",
        "1024x1024 x2 rows, 154 text tokens",
    }


def test_nothing_measured_is_nothing_said():
    report = report_forwards(StepCosts().as_json(), Model())
    assert report == {"measured_ms": {}, "path": {}, "attention": {}}


def test_the_status_of_a_replica_is_json_with_or_without_forwards():
    status = ReplicaStatus(
        stage="denoise",
        pool="denoiser",
        replica="a",
        pid=1,
        node="local",
        device="cuda",
        precision="fp8 weights, fp8 arithmetic",
        precision_reason="measured",
        resident_bytes=1,
        queue_length=0,
        cache_hits=0,
        cache_misses=0,
    )
    assert status.as_json()["measured_ms"] == {}
    status = replace(status, **report_forwards(_costs((SQUARE, 2, 0.0841)).as_json(), Model()))
    body = json.loads(json.dumps(status.as_json()))
    assert body["measured_ms"] == {bucket_label(128, 128, 333, 2): 84.1}
    assert body["path"] == {"1024x1024 x2 rows": "graph"}
    assert body["attention"] == {"1024x1024 x2 rows": "cudnn"}


def test_a_decoder_tells_what_became_of_each_size_that_it_prepared():
    kept = Prepared(True, "compiled", plain_ms=91.4, compiled_ms=38.5)
    report = report_decoding({(1, 16, 96, 128): kept, (1, 16, 64, 64): Prepared(False, "no room")})
    assert report["path"] == {"1024x768": "compiled", "512x512": "no room"}
    assert report["measured_ms"] == {"1024x768 plain": 91.4, "1024x768 compiled": 38.5}
