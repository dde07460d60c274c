"""Trains the built-in model from nothing: autoencoder, then transformer with text encoders.

    python -m deployments.builtin.train --out DIR --seed 0

writes ``DIR/model`` (the Diffusers directory, rewritten at every checkpoint), ``DIR/ema`` and
``DIR/vae`` (weights as trained), ``DIR/resume`` (to continue with ``--resume DIR``),
``DIR/log.jsonl``, ``DIR/training.json`` and ``DIR/samples*.png``. About 20 minutes on an H100 by
default; ``--smoke`` runs every part in miniature on two CPU cores.

Nothing heavy is imported before the arguments are read: data workers import this module too.
"""

import argparse
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line of the training script."""
    parser = argparse.ArgumentParser(prog="python -m deployments.builtin.train")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="directory of everything that is written")
    add("--seed", type=int, default=0)
    add("--device", default=None, help="cuda where there is one, else cpu")
    add("--smoke", action="store_true", help="everything in miniature, seconds on a CPU")
    add("--resume", type=Path, help="DIR of an earlier run: its autoencoder and its last state")
    add(
        "--init",
        type=Path,
        help="DIR of an earlier run, or an exported model: its weights, a fresh schedule",
    )
    add("--vae-from", type=Path, help="DIR of an earlier run: its autoencoder only")
    add("--vae-steps", type=int, help="bound of the autoencoder's training, instead of seconds")
    add("--vae-seconds", type=float, default=200.0)
    add("--vae-batch", type=int, default=128)
    add("--vae-lr", type=float, default=1e-3)
    add("--steps", type=int, help="bound of the transformer's training, instead of seconds")
    add("--seconds", type=float, default=950.0)
    add("--batch", type=int, default=512)
    add("--muon-lr", type=float, default=2.5e-3)
    add("--adam-lr", type=float, default=1.5e-3)
    add("--weight-decay", type=float, default=0.01)
    add("--hold", type=float, default=0.4, help="share of the budget before the rate falls")
    add("--ema-decay", type=float, default=0.999)
    add("--caption-dropout", type=float, default=0.1)
    add("--time-mean", type=float, default=0.0, help="of the logit-normal times")
    add("--time-std", type=float, default=1.0)
    add("--core", type=float, default=0.55, help="share of core examples")
    add("--hard", type=float, default=0.35)
    add("--terse", type=float, default=0.10)
    add("--square", type=float, default=0.75, help="share of steps at 256x256")
    add("--reuse", type=int, default=5, help="how often a drawn row is used on average")
    add("--workers", type=int, default=6)
    add("--no-compile", action="store_true")
    add("--no-graphs", action="store_true", help="launch kernels singly")
    add("--time-parts", action="store_true", help="log the time of each part of a step")
    add("--checkpoint-seconds", type=float, default=120.0)
    add("--evaluate-seconds", type=float, default=150.0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the training that the command line asks for."""
    options = parse_arguments(arguments)
    from deployments.builtin.training_run import TrainingRun

    TrainingRun(options).run()


if __name__ == "__main__":
    main()
