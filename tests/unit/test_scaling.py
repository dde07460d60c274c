"""What `loadtest.scaling` reckons: transfers from spans, ratios, targets; what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest

from loadtest.otlp_receiver import ReceivedSpan
from loadtest.scaling import parse_arguments, ratios_of, targets_of
from loadtest.scaling_arm import ARMS, kelvin_overrides
from loadtest.stage_transfers import has_all, payloads_mib, transfers
from serve.config import load_settings


def _span(name: str, span_id: str, parent: str, began_ms: float, ms: float) -> ReceivedSpan:
    began = int(began_ms * 1e6)
    return ReceivedSpan(
        name, "kelvin", "t", span_id, parent, {}, False, "", began, began + int(ms * 1e6), ()
    )


def _picture(number: int, transfer_ms: float) -> list[ReceivedSpan]:
    spans = []
    for at, stage in enumerate(("text", "denoise", "decode")):
        call, work = f"{number}-{stage}", f"{number}-{stage}-work"
        spans.append(_span(f"kelvin.{stage}", call, "root", 1000.0 * at, 100.0 + transfer_ms))
        spans.append(_span(f"kelvin.{stage}.replica", work, call, 1000.0 * at + 1.0, 100.0))
    return spans


def test_a_transfer_is_the_call_without_the_replicas_work():
    spans = [span for number, ms in enumerate((4.0, 6.0, 20.0)) for span in _picture(number, ms)]
    found = transfers(spans)
    assert set(found) == {"text", "denoise", "decode"}
    for stage in found.values():
        assert stage == {"calls": 3, "call_ms": 106.0, "transfer_ms": 6.0, "most_ms": 20.0}


def test_a_replicas_span_without_its_call_is_no_transfer():
    lost = [span for span in _picture(0, 4.0) if span.name != "kelvin.text"]
    assert "text" not in transfers(lost)
    assert not has_all(lost, 1)
    assert has_all(_picture(0, 4.0), 1)
    assert not has_all(_picture(0, 4.0), 2)


def test_payloads_of_a_large_picture():
    # 2 prompts of 333 tokens of 4096 bfloat16; 16 x 128 x 128 float32; 3 x 1024 x 1024 bytes.
    found = payloads_mib(1024, 333, 4096, two_bytes=True)
    assert found == {"embeddings": pytest.approx(5.203125), "latents": 1.0, "pixels": 3.0}


def test_targets():
    arms: dict[str, dict[str, Any]] = {
        "kelvin-one": {"pictures_per_s": 0.5},
        "kelvin-two": {"pictures_per_s": 0.96},
        "monoliths": {"failed": "it did not come up"},
    }
    assert ratios_of(arms) == {"kelvin-two/kelvin-one": pytest.approx(1.92)}
    [target] = targets_of(ratios_of(arms)).values()
    assert target == {"at_least": 1.9, "is": pytest.approx(1.92), "met": True}
    arms["kelvin-two"]["pictures_per_s"] = 0.94
    assert not targets_of(ratios_of(arms))["kelvin-two/kelvin-one"]["met"]
    assert targets_of(ratios_of({"kelvin-one": arms["kelvin-one"]})) == {}


@pytest.mark.parametrize("arm", [name for name in ARMS if name.startswith("kelvin")])
def test_shares_of_cards(arm):
    settings = load_settings(
        overrides=kelvin_overrides(arm, "pico", 1024, "cuda", "kelvin-data", None)
    )
    cards = 2 if arm == "kelvin-two" else 1
    assert settings.denoiser[0].num_replicas == cards
    # Two denoisers do not fit on one card, and nothing asks for more cards than there are.
    booked = [
        pool.num_gpus * pool.num_replicas for stage in settings.pools.values() for pool in stage
    ]
    assert math.fsum(booked) == pytest.approx(cards)
    assert 2 * settings.denoiser[0].num_gpus > 1


@pytest.mark.parametrize(
    "arguments", [["--arms", "kelvin-three"], ["--pictures", "0"], ["--side", "1000"]]
)
def test_what_cannot_be_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        parse_arguments(["--device", "cpu", *arguments])
    assert refused.value.code == 2
    assert arguments[0] in capsys.readouterr().err
