"""One load of a transformer, from the start of the process to its first forward."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from loadtest.memory_samples import AnonymousMemory


def main() -> None:
    """Load as told; print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("kelvin", "from_single_file", "from_pretrained"))
    parser.add_argument("where", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--joint", type=int, required=True)
    parser.add_argument("--began", type=float, required=True)
    options = parser.parse_args()
    import torch

    from loadtest.sd35 import random_inputs

    device = torch.device(options.device)
    torch.zeros(1, device=device)
    load = _kelvin if options.role == "kelvin" else _diffusers
    imported = load(options, device, None)
    started_s = time.monotonic() - options.began
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with AnonymousMemory() as host:
        began = time.monotonic()
        imported = load(options, device, imported)
        if cuda:
            torch.cuda.synchronize()
        load_s = time.monotonic() - began
    gpu_peak = torch.cuda.max_memory_allocated() if cuda else None
    side = options.size // 8
    inputs = random_inputs(imported["config"], 2, side, side, device)
    began = time.monotonic()
    with torch.inference_mode():
        imported["step"](inputs)
    if cuda:
        torch.cuda.synchronize()
    said = {
        "started_s": started_s,
        "load_s": load_s,
        "forward_s": time.monotonic() - began,
        "first_step_s": time.monotonic() - options.began,
        "host_peak_bytes": host.peak,
        "host_before_bytes": host.before,
        "gpu_peak_bytes": gpu_peak,
        "resident_bytes": imported["resident"](),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }
    print(json.dumps(said), flush=True)


def _kelvin(options: Any, device: Any, imported: Any) -> Any:
    from deployments.sd3.mmdit import Mmdit
    from deployments.sd3.optimizations import Optimizations
    from deployments.sd3.precision import choose_precision

    if imported is None:
        return {"precision": choose_precision("fp8", device)}
    eager = Optimizations(cuda_graphs=False)
    mmdit = Mmdit.load(options.where, device, imported["precision"], eager)
    config = json.loads((options.where / "transformer" / "config.json").read_text())
    return {
        "config": config,
        "step": lambda x: mmdit.velocity(x.latents, x.sigmas, x.prompt_embeds, x.pooled),
        "resident": lambda: mmdit.resident_bytes,
    }


def _diffusers(options: Any, device: Any, imported: Any) -> Any:
    import torch
    from diffusers import SD3Transformer2DModel

    if imported is None:
        return {}
    how: dict[str, Any] = {"torch_dtype": torch.bfloat16, "local_files_only": True}
    if options.role == "from_single_file":
        model = SD3Transformer2DModel.from_single_file(
            str(options.where), config=str(options.config), subfolder="transformer", **how
        )
    else:
        model = SD3Transformer2DModel.from_pretrained(
            str(options.where), subfolder="transformer", **how
        )
    model = model.to(device).eval()

    def step(x: Any) -> None:
        dtype = torch.bfloat16
        model(
            x.latents.to(dtype),
            x.prompt_embeds.to(dtype),
            x.pooled.to(dtype),
            x.sigmas * 1000,
            return_dict=False,
        )

    def resident() -> int:
        return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))

    return {"config": model.config, "step": step, "resident": resident}


if __name__ == "__main__":
    main()
