"""A real card's readings: believable, found by UUID whatever the process may see, energy rising."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cluster.thermal import NvmlCard, Reading
from deployments.card_uuid import card_uuid
from deployments.heat_watch import HeatWatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

ROOT = Path(__file__).parents[2]


def _card(index: int = 0) -> NvmlCard:
    uuid = card_uuid(torch.device("cuda", index))
    assert uuid is not None
    return NvmlCard(uuid)


def _read(card: NvmlCard) -> Reading:
    reading = card.read()
    assert reading is not None, card.problem
    return reading


def test_the_figures_are_believable() -> None:
    reading = _read(_card())
    print(reading)
    assert reading.source == "nvml"
    assert reading.temperature_c is not None, reading.problems
    assert 10 <= reading.temperature_c <= 100
    assert reading.margin_c is not None, reading.problems
    assert 0 < reading.margin_c < 100
    assert reading.limit_c is not None
    assert 70 <= reading.limit_c <= 110
    assert reading.power_w is not None, reading.problems
    assert reading.power_cap_w is not None
    assert 0 < reading.power_w < 1.5 * reading.power_cap_w
    assert reading.sm_clock_mhz is not None
    assert 100 <= reading.sm_clock_mhz <= 4000
    assert isinstance(reading.clocks_event_reasons, int), reading.problems


def test_an_h100_tells_everything() -> None:
    if "H100" not in torch.cuda.get_device_name():
        pytest.skip("no H100")
    reading = _read(_card())
    assert reading.problems == ()
    assert reading.memory_temperature_c is not None
    assert reading.temperature_c is not None
    # The nearer of 87 C for the GPU and 95 C for its memory, each read at another moment.
    nearer = min(87 - reading.temperature_c, 95 - reading.memory_temperature_c)
    assert reading.margin_c == pytest.approx(nearer, abs=3)


def test_energy_grows_while_it_computes() -> None:
    card = _card()
    before = _read(card)
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    most_s = 30.0
    began = time.monotonic()
    after = before
    while after.energy_j == before.energy_j and time.monotonic() - began < most_s:
        for _ in range(50):
            matrix @ matrix
        torch.cuda.synchronize()
        after = _read(card)
    assert before.energy_j is not None, before.problems
    assert after.energy_j is not None
    assert after.energy_j > before.energy_j


def test_reading_is_cheap_enough_to_repeat() -> None:
    card = _card()
    _read(card)
    began = time.perf_counter()
    for _ in range(20):
        _read(card)
    print(f"{(time.perf_counter() - began) / 20 * 1e3:.2f} ms a reading")


def test_the_card_is_found_whatever_the_process_may_see() -> None:
    last = torch.cuda.device_count() - 1
    uuid = card_uuid(torch.device("cuda", last))
    program = (
        "import torch; from cluster.thermal import NvmlCard;"
        "from deployments.card_uuid import card_uuid;"
        "uuid = card_uuid(torch.device('cuda', 0));"
        "assert torch.cuda.device_count() == 1;"
        "assert NvmlCard(uuid).read() is not None;"
        "print(uuid)"
    )
    seen = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": f"GPU-{uuid}"},
        capture_output=True,
        text=True,
    )
    assert seen.returncode == 0, seen.stderr[-2000:]
    assert seen.stdout.split()[-1] == uuid


def test_a_watch_reads_it_in_its_thread() -> None:
    watch = HeatWatch(_card(), 0.05)
    try:
        assert watch.newest is not None, watch.problem
        assert watch.age_s is not None
        assert watch.problem is None
    finally:
        watch.close()
