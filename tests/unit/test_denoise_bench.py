"""The measurements of the denoiser, run small on the CPU, where figures mean something too."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel

from deployments.sd3.mmdit import Mmdit
from deployments.sd3.precision import choose_precision
from loadtest import coldstart, coldstart_child, denoise_bench, fidelity
from loadtest.compilations import CompilationCounter
from loadtest.denoise_arms import diffusers_velocity, relative_error
from loadtest.fidelity_models import quantise_linears_alone
from loadtest.forward_timing import alternate
from loadtest.gpu_readings import GpuReadings
from loadtest.random_checkpoint import write_random_checkpoint
from loadtest.results import Results
from loadtest.sd35 import config, empty_transformer, random_inputs, random_transformer

CPU = torch.device("cpu")


def kept(tmp_path: Path) -> Results:
    return Results({}, tmp_path / "report.json", to_stdout=False)


def on_disk(results: Results) -> dict[str, Any]:
    assert results.out is not None
    report: dict[str, Any] = json.loads(results.out.read_text())
    return report


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another cost more than these models take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "billions"), [("large", 8.06), ("medium", 2.24)])
def test_real_configurations_have_the_published_number_of_parameters(name, billions):
    parameters = sum(each.numel() for each in empty_transformer(name).parameters())
    assert parameters / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("name", ["tiny", "tiny-dual"])
def test_random_weights_are_one_model_in_each_dtype_and_none_is_zero(name):
    model = random_transformer(name, CPU, torch.float32)
    same = random_transformer(name, CPU, torch.bfloat16)
    other = random_transformer(name, CPU, torch.float32, seed=1)
    for full_name, parameter in model.named_parameters():
        assert torch.equal(parameter, same.get_parameter(full_name).float())
        assert parameter.abs().min() > 0 or parameter.count_nonzero() > 0.99 * parameter.numel()
        assert not torch.equal(parameter, other.get_parameter(full_name))
    built = SD3Transformer2DModel(**config(name))
    torch.testing.assert_close(
        model.pos_embed.pos_embed, built.pos_embed.pos_embed, atol=4e-3, rtol=0
    )
    inputs = random_inputs(config(name), 2, 8, 8, CPU, text_tokens=7)
    velocity = diffusers_velocity(model, inputs)
    assert 0.1 < float(velocity.std()) < 10


def test_arms_take_turns_and_get_equally_many_steps():
    seen: list[str] = []
    took = alternate({name: partial(seen.append, name) for name in "ab"}, 8, 1, CPU)
    assert {name: len(each) for name, each in took.items()} == {"a": 8, "b": 8}
    turns = [name for at, name in enumerate(seen[2:]) if at == 0 or seen[2:][at - 1] != name]
    assert turns == ["a", "b", "a"]  # a; b twice in a row, for the order turns round; a


def test_a_card_that_is_none_gives_no_readings():
    with GpuReadings(CPU) as readings:
        pass
    assert readings.joules is None
    assert readings.summary()["sm_clock_mhz"] is None


def test_the_bench_measures_what_was_asked_for(tmp_path):
    arguments = "--model tiny --size 64 --device cpu --arms eager,kelvin --steps 2 --warm-up 1"
    options = denoise_bench.parse_arguments([*arguments.split(), "--sustained", "0.01", "--stages"])
    with kept(tmp_path) as results:
        results.keep(model="large", size=1024, pretend=None, rows=2, device="cpu")
        denoise_bench.measure(options, results)
    report = on_disk(results)
    assert report["complete"] is True
    assert report["short_ms"].keys() == report["sustained"].keys() == {"eager", "kelvin"}
    short = report["short_ms"]
    expected = short["eager"]["median"] / short["kelvin"]["median"]
    assert report["ratios"]["eager/kelvin"] == pytest.approx(expected)
    assert 0 < report["kelvin"]["relative_difference_from_eager_bf16"] < 0.1
    assert report["stages"]["text_gib"] > 0
    assert denoise_bench.targets_of(report)["resident_gib"]["met"] is True
    assert denoise_bench.table_of(report).row_count == 2


def test_each_optimisation_is_switched_off_alone(tmp_path):
    arguments = "--model tiny-dual --size 64 --device cpu --arms none --steps 1 --warm-up 0"
    with kept(tmp_path) as results:
        options = denoise_bench.parse_arguments([*arguments.split(), "--ablations"])
        denoise_bench.measure(options, results)
    ablations = on_disk(results)["ablations"]
    assert {"all_on", "without_fused_qkv", "without_cuda_graphs", "all_on_again"} <= set(ablations)
    assert all("median_ms" in variant for variant in ablations.values()), ablations
    resident = {name: variant["resident_gib"] for name, variant in ablations.items()}
    if choose_precision("auto", "cpu").fp8_arithmetic == "int8_mm":
        assert resident["all_on"] < resident["without_int8_products"]
    else:
        assert resident["without_unpacked_weights"] < resident["all_on"]


@pytest.mark.parametrize(
    ("ratio", "pretend", "met"),
    [(2.2, None, True), (2.0, None, False), (2.0, "sm_86", None)],
)
def test_targets_judge_a_card_as_it_is_and_not_one_that_pretends(ratio, pretend, met):
    report = {"model": "large", "size": 1024, "pretend": pretend}
    report |= {"ratios": {"eager/kelvin": ratio}, "kelvin": {"peak_gib": 11.0}}
    targets = denoise_bench.targets_of(report)
    assert targets["peak_gib"] == {"at_most": 10.0, "is": 11.0, "met": False}
    assert targets.get("eager/kelvin", {}).get("met") is met


def test_quantising_the_linears_alone_is_an_error_of_e4m3_and_no_other():
    inputs = random_inputs(config("tiny"), 2, 8, 8, CPU, text_tokens=7)
    model = random_transformer("tiny", CPU, torch.float32)
    exact = diffusers_velocity(model, inputs)
    quantise_linears_alone(model)
    assert 0.01 < relative_error(diffusers_velocity(model, inputs), exact) < 0.1


def test_fidelity_holds_each_way_against_its_yardstick(tmp_path):
    options = fidelity.parse_arguments(
        ["--model", "tiny", "--size", "64", "--device", "cpu", "--seeds", "1", "--sigmas", "3"]
    )
    with kept(tmp_path) as results:
        results.keep(model="tiny", device="cpu")
        fidelity.measure(options, results)
    report = on_disk(results)
    assert set(report["errors"]) == {
        "linears_alone_fp8",
        "diffusers_bf16",
        "kelvin_bf16",
        "kelvin_fp8",
    }
    assert all(len(errors["each"]) == 3 for errors in report["errors"].values())
    assert report["bf16"]["met"]
    assert report["fp8"]["met"]
    assert report["fp8"]["yardstick_error"] > 2 * report["bf16"]["yardstick_error"]
    assert fidelity.table_of(report).row_count == 4


def test_a_written_checkpoint_is_the_random_transformer_in_fp8(tmp_path):
    write_random_checkpoint(tmp_path, "tiny-dual", CPU)
    loaded = Mmdit.load(tmp_path, CPU, "fp32")
    inputs = random_inputs(config("tiny-dual"), 2, 8, 8, CPU, text_tokens=7)
    found = loaded.velocity(inputs.latents, inputs.sigmas, inputs.prompt_embeds, inputs.pooled)
    exact = diffusers_velocity(random_transformer("tiny-dual", CPU, torch.float32), inputs)
    assert 0.005 < relative_error(found, exact) < 0.1
    assert Mmdit.load(tmp_path, CPU, choose_precision("fp8", CPU)).precision.weights == "fp8"


def test_a_start_is_timed_to_its_first_step_and_requests_compile_nothing(tmp_path, capsys):
    write_random_checkpoint(tmp_path, "tiny", CPU)
    options = argparse.Namespace(
        model="tiny", device="cpu", dir=tmp_path, size=64, requests=3, steps=1, warm_rows="2"
    )
    options.began = 0.0
    coldstart_child.start(options)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    at = [event["at_s"] for event in events if event["event"] == "phase"]
    assert at == sorted(at)
    (ready,) = (event for event in events if event["event"] == "ready")
    assert at[-2] <= ready["seconds"] <= at[-1]
    (sent,) = (event for event in events if event["event"] == "requests")
    assert (sent["finished"], sent["failed"], sent["compiled"]) == (3, 0, 0)
    targets = coldstart.targets_of({"start": {"ready": ready, "requests": sent}})
    assert targets["compiled"]["met"]
    assert not coldstart.targets_of({"start": {"requests": sent | {"failed": 1}}})["failed"]["met"]


def test_what_torch_compiles_is_counted_once():
    counter = CompilationCounter()
    compiled = torch.compile(lambda x: x * 2 + 1, backend="eager")
    before = counter.counts()
    compiled(torch.ones(3))
    assert counter.counts().since(before).compiled == 1
    compiled(torch.ones(3))
    assert counter.counts().since(before).compiled == 1


def test_triton_is_heard_when_it_compiles_and_when_it_loads_from_disk(monkeypatch):
    knobs = SimpleNamespace(compilation=SimpleNamespace(listener=None))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(knobs=knobs))
    counter = CompilationCounter()
    for hit in (False, True, True):
        # As triton 3.6 calls it
        knobs.compilation.listener(
            src=SimpleNamespace(name="gelu"),
            metadata={},
            metadata_group={},
            times=None,
            cache_hit=hit,
        )
    counts = counter.counts()
    assert (counts.triton, counts.triton_loaded, counts.compiled) == (
        1,
        2,
        1 + counts.dynamo_graphs,
    )
    assert counter.compiled_names == ["gelu"]


def test_an_interrupted_run_keeps_what_it_measured(tmp_path):
    results = kept(tmp_path)

    def run() -> None:
        with results:
            results.keep(first={"ms": 1.0})
            results.keep_part("second", "a", 2.0)
            raise RuntimeError("the card is gone")

    with pytest.raises(RuntimeError, match="gone"):
        run()
    report = on_disk(results)
    assert (report["first"], report["second"]) == ({"ms": 1.0}, {"a": 2.0})
    assert report["complete"] is False
    assert "the card is gone" in report["ended_by"]


def test_a_time_limit_ends_a_run_with_its_report(tmp_path):
    script = (
        "import os, signal\n"
        "from loadtest.results import Results\n"
        "with Results({}, None, to_stdout=True) as results:\n"
        "    results.keep(first=1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    signal.pause()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 128 + 15
    assert json.loads(ended.stdout)["first"] == 1


@pytest.mark.parametrize(
    ("parse", "arguments", "named"),
    [
        (denoise_bench.parse_arguments, ["--arms", "eager,tensorrt"], "--arms"),
        (denoise_bench.parse_arguments, ["--size", "1000"], "--size"),
        (denoise_bench.parse_arguments, ["--pretend", "sm_70"], "--pretend"),
        (fidelity.parse_arguments, ["--sigmas", "0"], "--sigmas"),
        (coldstart.parse_arguments, ["--warm-rows", "2,x"], "--warm-rows"),
    ],
)
def test_nonsense_is_refused_before_anything_is_loaded(parse, arguments, named, capsys):
    with pytest.raises(SystemExit) as refused:
        parse(arguments)
    assert refused.value.code == 2
    assert named in capsys.readouterr().err
