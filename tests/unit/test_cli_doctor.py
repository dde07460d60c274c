"""What `kelvin doctor` says about hardware, drivers and model files that this machine lacks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from serve.__main__ import main
from serve.checkpoints.lora_file import BaseModel
from serve.commands import doctor as doctor_module
from serve.commands.finding import Finding, table_of
from serve.commands.hardware import (
    Gpu,
    Gpus,
    TorchBuild,
    check_disk,
    check_driver,
    check_gpus,
    check_precision,
    check_torch,
    find_gpus,
    find_torch,
)
from serve.commands.lora_check import check_loras
from serve.commands.model_files import check_model
from serve.commands.output import console
from serve.config import ModelSettings, Settings
from serve.lora_settings import LoraSettings
from serve.model_dir import resolve_model_dir
from tests.unit.lora_files import random_lora, written

H100 = Gpu("NVIDIA H100 80GB HBM3", 80 << 30, (9, 0))


@pytest.mark.parametrize(
    ("cuda", "driver", "verdict"),
    [
        ("13.0", "580.65.06", "ok"),
        ("13.0", "575.57.08", "failed"),
        ("13.2", "590.44", "ok"),
        ("12.8", "525.60.13", "ok"),
        ("12.8", "470.82.01", "failed"),
        ("11.8", "450.80.02", "ok"),
        ("14.0", "600.10", "warning"),
        (None, "470.82.01", "ok"),
    ],
)
def test_the_driver_must_be_new_enough_for_the_build(
    cuda: str | None, driver: str, verdict: str
) -> None:
    finding = check_driver(TorchBuild("2.13.0", cuda), Gpus(driver, (H100,)))
    assert finding.verdict == verdict
    assert bool(finding.remedy) == (verdict != "ok")


def test_no_gpu_is_not_a_failure() -> None:
    none = Gpus(None, (), "library not found")
    build = TorchBuild("2.13.0+cpu", None)
    verdicts = [f.verdict for f in (check_gpus(none), check_driver(build, none))]
    assert verdicts == ["ok", "ok"]
    assert "library not found" in check_gpus(none).detail


def test_a_gpu_that_torch_cannot_use_is_warned_of() -> None:
    finding = check_torch(TorchBuild("2.13.0+cpu", None), Gpus("580.1", (H100,)))
    assert finding.verdict == "warning"
    assert finding.remedy


def test_cards_are_named_with_memory_and_capability() -> None:
    assert check_gpus(Gpus("580.1", (H100,))).detail == "NVIDIA H100 80GB HBM3 80 GiB sm_90"


def test_a_card_that_torch_does_not_see_gives_no_precision() -> None:
    finding = check_precision("auto", TorchBuild("2.13.0", "13.0"), Gpus("580.1", (H100,)))
    assert finding.verdict == "failed"
    assert finding.remedy


def test_the_precision_is_that_of_the_model_on_this_card(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a10g = Gpu("NVIDIA A10G", 22 << 30, (8, 6))
    answers = {
        "is_available": True,
        "current_device": 0,
        "get_device_capability": a10g.capability,
        "get_device_name": a10g.name,
        "mem_get_info": (2 << 20, 22 << 30),
        "memory_allocated": 0,
        "memory_reserved": 0,
        "get_per_process_memory_fraction": 1.0,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    where = TorchBuild("2.13.0", "13.0"), Gpus("580.1", (a10g,)), tmp_path
    weights = {"a.weight": np.zeros((1024, 1024), np.float16)}
    save_file(weights, tmp_path / "model.safetensors")
    too_large = check_precision("bf16", *where)
    assert too_large.verdict == "failed"
    assert "NVIDIA A10G (sm_86)" in too_large.detail
    assert "fp8" in too_large.remedy

    fitting = check_precision("fp8", *where)
    assert fitting.verdict == "ok"
    assert "fp8 weights, bf16 arithmetic on cuda" in fitting.detail
    assert "not measured" in fitting.detail  # speeds, on such cards


def test_the_torch_build_is_found_without_importing_torch() -> None:
    from importlib.metadata import version

    build = find_torch()
    assert build is not None
    assert build.version.split("+")[0] == version("torch").split("+")[0]


def test_disk_space_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    assert str(tmp_path) in check_disk(tmp_path / "not" / "made" / "yet").detail


def test_a_directory_s_parts_are_named_with_their_stored_types() -> None:
    findings = {finding.name: finding for finding in check_model(ModelSettings(path="pico"))}
    assert "scaled FP8 by channel" in findings["transformer"].detail
    figures = findings["VAE"].figures
    assert figures is not None
    assert set(figures["parameters_by_dtype"]) == {"F16"}


@pytest.mark.parametrize("damage", [b"", b"short", b"\xff" * 64])
def test_a_weight_file_that_is_damaged_is_named(tmp_path: Path, damage: bytes) -> None:
    folder = Path(shutil.copytree(resolve_model_dir(ModelSettings(path="pico")), tmp_path / "m"))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(damage)
    (finding,) = check_model(ModelSettings(path=str(folder)))
    assert finding.verdict == "failed"
    assert "diffusion_pytorch_model.safetensors" in finding.detail


def test_a_shard_that_an_index_names_must_be_there(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(resolve_model_dir(ModelSettings(path="pico")), tmp_path / "m"))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "vae" / "model.safetensors.index.json").write_text(json.dumps(index))
    (finding,) = check_model(ModelSettings(path=str(folder)))
    assert "00001-of-00002" in finding.detail


@pytest.mark.parametrize("shard", ["../other.safetensors", "", ".", "a\0b", "\ud800", "a" * 300, 5])
def test_an_index_that_names_no_file_beside_it_is_refused(tmp_path: Path, shard: object) -> None:
    folder = Path(shutil.copytree(resolve_model_dir(ModelSettings(path="pico")), tmp_path / "m"))
    index = folder / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    (finding,) = check_model(ModelSettings(path=str(folder)))
    assert finding.verdict == "failed"
    assert str(folder / "vae") in finding.detail


def test_a_model_that_is_not_there_fails_with_a_remedy(tmp_path: Path) -> None:
    (finding,) = check_model(ModelSettings(path=str(tmp_path / "nothing")))
    assert finding.verdict == "failed"
    assert finding.remedy


def test_loras_are_listed_with_their_ranks_and_why_one_does_not_fit(tmp_path: Path) -> None:
    loras = tmp_path / "models" / "loras"
    model = ModelSettings(path="pico", models_dir=str(tmp_path / "models"))
    base = BaseModel.of_folder(resolve_model_dir(model))
    written(loras / "styles" / "ink.safetensors", random_lora(base, 20, 0, "transformer", "t5"))
    written(loras / "vast.safetensors", random_lora(base, 200, 0, "transformer"))
    other = "transformer.transformer_blocks.0.attn.to_q"
    matrices = {f"{other}.lora_A.weight": (4, 2432), f"{other}.lora_B.weight": (2432, 4)}
    written(loras / "large.safetensors", {n: torch.zeros(s) for n, s in matrices.items()})
    for number in range(12):
        (loras / f"x{number:02}.safetensors").write_bytes(b"no header")
    fitting, *refused = check_loras(model, LoraSettings())
    assert fitting.detail == (
        "1 for this model: styles/ink (rank 20 of transformer, rank 20 of T5)"
    )
    assert fitting.figures is not None
    assert fitting.figures["styles/ink"]["ranks"] == {"transformer": 20, "t5": 20}
    assert "'large'" in refused[0].detail
    assert "it seems to be for Stable Diffusion 3.5 Large" in refused[0].detail
    assert "208 ranks" in refused[1].detail
    assert "header" in refused[2].detail
    assert len(refused) == 11
    assert refused[-1].detail == "4 more cannot be used with this model"
    assert {each.verdict for each in refused} == {"warning"}


@pytest.mark.parametrize(
    ("name", "verdict", "said"),
    [("other", "ok", "1 beside kelvin-pico"), (None, "failed", "Two models have the name")],
)
def test_models_that_cannot_stand_side_by_side_are_said(
    name: str | None, verdict: str, said: str
) -> None:
    further = {"model": {"path": "pico", "name": name}}
    settings = Settings.model_validate({"model": {"path": "pico"}, "models": [further]})
    (finding,) = [each for each in doctor_module.examine(settings) if each.name == "models"]
    assert finding.verdict == verdict
    assert said in finding.detail


def test_the_models_that_come_with_kelvin_are_under_its_licence() -> None:
    model, *_, licence = check_model(ModelSettings(path="pico"))
    assert model.verdict == "ok"
    assert "Apache-2.0" in licence.detail


@pytest.mark.parametrize(("verdict", "code"), [("ok", 0), ("warning", 0), ("failed", 1)])
def test_the_exit_code_and_the_json_say_whether_a_check_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verdict: str, code: int
) -> None:
    finding = Finding("sun", verdict, "[not markup]", "wait")  # type: ignore[arg-type]
    monkeypatch.setattr(doctor_module, "examine", lambda _: iter([finding]))
    assert main(["doctor", "--json"]) == code
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "ok": code == 0,
        "checks": [{"name": "sun", "verdict": verdict, "detail": "[not markup]", "remedy": "wait"}],
    }


def test_the_table_shows_each_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    console().print(table_of([Finding("store", "failed", "away [x]", "start it")]))
    shown = capsys.readouterr().err
    assert "away [x]" in shown
    assert "start it" in shown


@pytest.mark.gpu
@pytest.mark.skipif(not find_gpus().cards, reason="no NVIDIA GPU")
def test_the_cards_of_this_machine_are_found() -> None:
    gpus = find_gpus()
    assert gpus.driver is not None
    assert all(card.memory_bytes > 1 << 30 and card.capability >= (5, 0) for card in gpus.cards)
    assert check_driver(find_torch(), gpus).verdict == "ok"
