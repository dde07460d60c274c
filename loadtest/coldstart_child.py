"""The processes that `loadtest.coldstart` starts: one writes the checkpoint, one serves from it.

Says what happens as JSON lines on standard output. Nothing heavy is imported before the clock is
read, for imports are part of what is measured.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deployments.engine import Engine
    from deployments.payloads import DenoiseJob, PromptEmbedding
    from loadtest.compilations import CompilationCounter, Counts
    from loadtest.launch_times import LaunchTimes

TEXT_TOKENS = 333
SIZES = (
    (256, 256),
    (256, 320),
    (320, 256),
    (320, 320),
    (384, 256),
    (256, 384),
    (384, 384),
    (448, 320),
    (320, 448),
    (512, 384),
    (384, 512),
    (512, 512),
)
"""Width and height of the requests; short ones, for it is compilers that are watched."""

_IN_FLIGHT = 16
_LONGEST_WAIT_S = 300.0


def write(options: argparse.Namespace) -> None:
    """Write the checkpoint unless it is there."""
    import torch

    from loadtest.random_checkpoint import write_random_checkpoint

    write_random_checkpoint(options.dir, options.model, torch.device(options.device))
    files = list((options.dir / "transformer").iterdir())
    say(event="written", gib=sum(file.stat().st_size for file in files) / 2**30)


def start(options: argparse.Namespace) -> None:
    """Do what a denoiser does until its first finished step, then serve requests."""

    def phase(name: str) -> None:
        say(event="phase", name=name, at_s=time.monotonic() - options.began)

    phase("interpreter")
    import torch

    phase("import_torch")
    from deployments.engine import Engine
    from deployments.sd3.mmdit import Mmdit
    from deployments.sd3.precision import choose_precision
    from deployments.warm_up import warm_up
    from loadtest.compilations import CompilationCounter
    from loadtest.launch_times import LaunchTimes

    phase("import_kelvin")
    device = torch.device(options.device)
    torch.zeros(1, device=device)
    phase("device")
    counter = CompilationCounter()
    precision = choose_precision("fp8", device)
    phase("precision")
    mmdit = Mmdit.load(options.dir, device, precision)
    phase("load")
    rows = [int(each) for each in options.warm_rows.split(",") if each]
    warmed = warm_up(mmdit, [(options.size, options.size)], TEXT_TOKENS, rows)
    phase("warm_up")
    launches = LaunchTimes(mmdit)
    engine = Engine(
        launches,
        max_waiting=_IN_FLIGHT,
        costs=warmed.costs,
        memory=warmed.memory,
        prepared_rows=warmed.prepared_rows,
    )
    try:
        prompt = (mmdit.joint_attention_dim, mmdit.pooled_projection_dim)
        step_s = first_step(engine, job_of(0, options.size, options.size, 2, True, prompt))
        phase("first_step")
        at_first = counter.counts()
        say(
            event="ready",
            seconds=step_s - options.began,
            precision=precision.label,
            resident_gib=mmdit.resident_bytes / 2**30,
            compiled=vars(at_first),
            device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        )
        if options.requests:
            requests(engine, launches, counter, options, prompt)
    finally:
        engine.close()


def first_step(engine: Engine, job: DenoiseJob) -> float:
    """Run a job; return the monotonic time at which its first step was done."""
    from deployments.payloads import StepProgress

    done = threading.Event()
    at: list[float] = []
    ended: list[Any] = []

    def on_event(event: object) -> None:
        if isinstance(event, StepProgress):
            at.append(time.monotonic())
            return
        ended.append(event)
        done.set()

    engine.submit(job, on_event)
    if not done.wait(_LONGEST_WAIT_S):
        raise TimeoutError("the first job did not end")
    if isinstance(ended[0], BaseException):
        raise ended[0]
    return at[0]


def requests(
    engine: Engine,
    launches: LaunchTimes,
    counter: CompilationCounter,
    options: argparse.Namespace,
    prompt: tuple[int, int],
) -> None:
    """Send requests over all sizes, a few at a time, and count what is compiled meanwhile."""
    from deployments.payloads import Latents, StepProgress

    before: Counts = counter.counts()
    names_before = len(counter.compiled_names)
    launches.clear()
    room = threading.Semaphore(_IN_FLIGHT)
    lock = threading.Lock()
    paths: dict[str, int] = {}
    outcomes: list[str] = []

    def on_event(event: object) -> None:
        if isinstance(event, StepProgress):
            with lock:
                paths[event.path] = paths.get(event.path, 0) + 1
            return
        outcomes.append("" if isinstance(event, Latents) else f"{type(event).__name__}: {event}")
        room.release()

    began = time.monotonic()
    for number in range(options.requests):
        width, height = SIZES[number % len(SIZES)]
        guided = number // len(SIZES) % 2 == 0
        if not room.acquire(timeout=_LONGEST_WAIT_S):
            break
        engine.submit(job_of(number, width, height, options.steps, guided, prompt), on_event)
    for _ in range(_IN_FLIGHT):
        room.acquire(timeout=_LONGEST_WAIT_S)
    spent = counter.counts().since(before)
    errors = [outcome for outcome in outcomes if outcome]
    say(
        event="requests",
        sent=options.requests,
        finished=len(outcomes) - len(errors),
        failed=options.requests - len(outcomes) + len(errors),
        errors=sorted(set(errors))[:5],
        sizes=len(SIZES),
        seconds=time.monotonic() - began,
        compiled=spent.compiled,
        compiled_by=vars(spent),
        compiled_names=counter.compiled_names[names_before:][:20],
        steps_by_path=paths,
        launches=launches.summary(),
    )


def job_of(
    number: int, width: int, height: int, steps: int, guided: bool, prompt: tuple[int, int]
) -> DenoiseJob:
    """Return a request with a made-up prompt; sides in pixels."""
    from deployments.payloads import DenoiseJob

    return DenoiseJob(
        job_id=str(number),
        image=0,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=4.0 if guided else 1.0,
        sampler="euler",
        scheduler="normal",
        shift=3.0,
        seed=number,
        positive=embedding(number % 4, *prompt),
        negative=embedding(4, *prompt) if guided else None,
    )


@cache
def embedding(seed: int, width_of_tokens: int, width_of_pooled: int) -> PromptEmbedding:
    """Return a made-up prompt, float32."""
    import numpy as np

    from deployments.payloads import PromptEmbedding, Stamp

    random = np.random.default_rng(seed)
    tokens = random.standard_normal((TEXT_TOKENS, width_of_tokens), dtype=np.float32)
    pooled = random.standard_normal(width_of_pooled, dtype=np.float32)
    return PromptEmbedding(tokens, pooled, (), Stamp("", 0, "", 0.0, 0.0))


def say(**event: Any) -> None:
    """Write one JSON line."""
    print(json.dumps(event), flush=True)  # the parent reads it


def main() -> None:
    """Command line; not for people."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.coldstart_child")
    add = parser.add_argument
    add("role", choices=("write", "start"))
    add("--model", required=True)
    add("--device", required=True)
    add("--dir", type=Path, required=True)
    add("--size", type=int, required=True)
    add("--requests", type=int, required=True)
    add("--steps", type=int, required=True)
    add("--warm-rows", required=True)
    add("--began", type=float, required=True)
    options = parser.parse_args()
    (write if options.role == "write" else start)(options)


if __name__ == "__main__":
    main()
