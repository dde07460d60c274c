"""How soon a checkpoint of real size is loaded, against reading its file and against diffusers.

    python -m loadtest.load_bench --json

Writes a random Large once as one bf16 file (16 GB), one scaled FP8 file (8 GB) and a bf16 Diffusers
directory for the peer. Then each is loaded in processes of their own, with the page cache cold and
warm, to the first forward (two rows, no CUDA graphs: eager on both sides), and the file is read by
`dd` for comparison. Host memory is anonymous memory: mapped pages are the page cache's.
`started_s` is the process with its imports and the card's context, `load_s` the weights,
`forward_s` the first forward; `first_step_s` all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from loadtest import command_line
from loadtest.random_checkpoint import write_random_checkpoint, write_random_file
from loadtest.results import Results
from loadtest.sd35 import config, largest_side
from serve.checkpoints.companions import load_part
from serve.checkpoints.families import parts_in
from serve.checkpoints.reference import REFERENCE, reference_to
from serve.checkpoints.tensor_files import TensorFiles

MOST_HOST_BYTES = 2 << 30
MOST_GPU_BYTES_BESIDE = 1 << 30
LEAST_SPEEDUP = 2.0
_BLOCK = 16 << 20

Cache = Literal["cold", "warm"]


def measure(options: argparse.Namespace, results: Results) -> None:
    """Write what is missing, then load each file in turn."""
    folder: Path = options.dir
    device = torch.device(options.device)
    files = {form: folder / f"{options.model}-{form}.safetensors" for form in ("bf16", "fp8")}
    began = time.monotonic()
    write_random_file(files["bf16"], options.model, "bf16", device)
    write_random_file(files["fp8"], options.model, "fp8", device)
    directory = folder / "diffusers"
    if options.peers:
        write_random_checkpoint(directory, options.model, device, fp8=False)
    sizes = {form: file.stat().st_size for form, file in files.items()}
    results.keep(files={"bytes": sizes, "seconds": time.monotonic() - began})
    shards = sorted((directory / "transformer").glob("*.safetensors")) if options.peers else []
    for form, file in files.items():
        _refer(folder / f"view-{form}", file)
    # What is compiled once and kept on disk is not what is measured.
    _child("kelvin", folder / "view-fp8", options)
    caches: tuple[Cache, ...] = ("cold", "warm")
    for form, file in files.items():
        for cache in caches:
            results.keep_part(f"{form}_{cache}", "dd", _dd(file, cache))
            _set_cache([file], cache)
            found = _child("kelvin", folder / f"view-{form}", options)
            if "load_s" in found:
                found["gb_per_s"] = sizes[form] / 1e9 / found["load_s"]
            results.keep_part(f"{form}_{cache}", "kelvin", found)
        if options.peers:
            _set_cache([file], "warm")
            found = _child("from_single_file", file, options, folder / f"view-{form}")
            results.keep_part(f"{form}_warm", "from_single_file", found)
    if options.peers:
        _set_cache(shards, "warm")
        found = _child("from_pretrained", directory, options)
        results.keep_part("bf16_warm", "from_pretrained", found)
    results.keep(targets=targets_of(results.report))


def targets_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what each load must keep to and whether it does."""
    targets: dict[str, dict[str, Any]] = {}
    for run in ("bf16_cold", "bf16_warm", "fp8_cold", "fp8_warm"):
        ours = report.get(run, {}).get("kelvin", {})
        if "load_s" not in ours:
            continue
        host = ours["host_peak_bytes"]
        targets[f"{run}_host"] = _at_most(MOST_HOST_BYTES, host)
        if ours["gpu_peak_bytes"] is not None:
            beside = ours["gpu_peak_bytes"] - ours["resident_bytes"]
            targets[f"{run}_gpu_beside"] = _at_most(MOST_GPU_BYTES_BESIDE, beside)
    warm = report.get("bf16_warm", {})
    for peer in ("from_single_file", "from_pretrained"):
        if "first_step_s" in warm.get(peer, {}) and "first_step_s" in warm.get("kelvin", {}):
            times = warm[peer]["first_step_s"] / warm["kelvin"]["first_step_s"]
            met = times >= LEAST_SPEEDUP
            targets[f"times_{peer}"] = {"at_least": LEAST_SPEEDUP, "is": times, "met": met}
    return targets


def _at_most(limit: int, value: int) -> dict[str, Any]:
    return {"at_most": limit, "is": value, "met": value <= limit}


def _refer(view: Path, file: Path) -> None:
    """Write a model folder whose transformer is in a file."""
    files = TensorFiles.of([file])
    found = load_part(files, parts_in(files)["transformer"], "transformer")
    transformer = view / "transformer"
    transformer.mkdir(parents=True, exist_ok=True)
    (transformer / "config.json").write_text(json.dumps(found.config), encoding="utf-8")
    (transformer / REFERENCE).write_text(json.dumps(reference_to(found.part)), encoding="utf-8")


def _set_cache(files: Sequence[Path], cache: Cache) -> None:
    for file in files:
        if cache == "warm":
            _read(file)
            continue
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _read(file: Path) -> None:
    with file.open("rb", buffering=0) as stream:
        buffer = bytearray(_BLOCK)
        while stream.readinto(buffer):
            pass


def _dd(file: Path, cache: Cache) -> dict[str, float]:
    _set_cache([file], cache)
    began = time.monotonic()
    command = ["dd", f"if={file}", "of=/dev/null", f"bs={_BLOCK}"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    return {"seconds": seconds, "gb_per_s": file.stat().st_size / 1e9 / seconds}


def _child(
    role: str, where: Path, options: argparse.Namespace, beside: Path | None = None
) -> dict[str, Any]:
    """Run one load in a new process; return what it says last."""
    command = [sys.executable, "-m", "loadtest.load_bench_child", role, str(where)]
    command += ["--device", options.device, "--size", str(options.size)]
    command += ["--joint", str(config(options.model)["joint_attention_dim"])]
    if beside is not None:
        command += ["--config", str(beside)]
    # The monotonic clock is the machine's, so the child counts from before it was there.
    command += ["--began", repr(time.monotonic())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit_s)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"exit_code": done.returncode, "said": done.stderr[-600:]}
    said: dict[str, Any] = json.loads(lines[-1])
    return said


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.load_bench", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--model", default="large", choices=("large", "medium", "tiny", "tiny-dual"))
    add("--size", type=command_line.side, default=1024, help="side of the first picture, pixels")
    add("--dir", type=command_line.folder_to_fill, help="where the files are kept; on a local disk")
    add("--no-peers", dest="peers", action="store_false", help="without diffusers")
    add("--limit-s", type=command_line.number(1, 3600), default=300.0, help="of each load")
    command_line.add_device_and_report(parser)
    options = parser.parse_args(arguments)
    if options.dir is None:
        options.dir = Path(tempfile.gettempdir()) / "kelvin-load-bench" / options.model
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit 1 if a target is missed or a load of Kelvin's failed."""
    return command_line.run_in_words(_run_all, parse_arguments(arguments))


def _run_all(options: argparse.Namespace) -> int:
    command_line.check_side(options.size, largest_side(options.model))
    options.dir.mkdir(parents=True, exist_ok=True)
    known = command_line.known_before("loadtest.load_bench", options, "model", "size")
    with Results(known, options.out, options.json) as results:
        measure(options, results)
    ours = [part["kelvin"] for name, part in results.report.items() if name.endswith("_warm")]
    failed = any("exit_code" in each for each in ours)
    return int(failed or not all(each["met"] for each in results.report["targets"].values()))


if __name__ == "__main__":
    sys.exit(main())
