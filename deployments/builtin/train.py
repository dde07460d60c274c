"""Trains the built-in model from nothing: autoencoder, then transformer with text encoders.

    python -m deployments.builtin.train --out DIR --seed 0

writes ``DIR/model`` (the Diffusers directory, rewritten at every checkpoint), ``DIR/ema`` and
``DIR/vae`` (weights as trained), ``DIR/resume`` (to continue with ``--resume DIR``),
``DIR/log.jsonl``, ``DIR/training.json`` and ``DIR/samples*.png``. ``--smoke`` runs every part in
miniature on two CPU cores. Under ``torchrun``, or with its variables set by hand, several GPUs
share the transformer's training (``data_parallel``), which then needs ``--vae-from``. The defaults
are those of the shipped weights: ten minutes on four H100s; one needs ``--seconds 2400``.
``training_record`` holds the curves of earlier runs, to predict from and to compare with.

Nothing heavy is imported before the arguments are read: data workers import this module too.
"""

import argparse
from pathlib import Path

from deployments.builtin.flow_training import FlowTraining


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line of the training script."""
    parser = argparse.ArgumentParser(prog="python -m deployments.builtin.train")
    add = parser.add_argument
    flow = FlowTraining()
    add("--out", type=Path, required=True, help="directory of everything that is written")
    add("--seed", type=int, default=0)
    add("--heads", type=int, help="of the transformer, 64 channels each")
    add("--layers", type=int, help="blocks of the transformer")
    add("--t5-head-width", type=int, help="channels of one head of T5")
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
    add("--vae-seconds", type=float, default=140.0)
    add("--vae-batch", type=int, default=128)
    add("--vae-lr", type=float, default=1e-3)
    add("--steps", type=int, help="bound of the transformer's training, instead of seconds")
    add("--seconds", type=float, default=flow.seconds)
    add("--batch", type=int, default=flow.batch, help="rows in a step, of all GPUs together")
    add("--muon-lr", type=float, default=flow.muon_lr)
    add("--adam-lr", type=float, default=flow.adam_lr)
    add("--weight-decay", type=float, default=flow.weight_decay)
    add("--hold", type=float, default=flow.hold, help="share of the budget before the rate falls")
    add("--ema-decay", type=float, default=flow.ema_decay)
    add("--caption-dropout", type=float, default=flow.caption_dropout)
    add("--time-mean", type=float, default=flow.time_mean, help="of the logit-normal times")
    add("--time-std", type=float, default=flow.time_std)
    add("--core", type=float, default=0.30, help="weight of core examples")
    add("--hard", type=float, default=0.40)
    add("--terse", type=float, default=0.10)
    add("--word", type=float, default=0.20, help="share of spelled capitals, to learn letters from")
    add("--square", type=float, default=0.88, help="share of steps at 256x256")
    add("--reuse", type=int, default=flow.reuse, help="how often a drawn row is used on average")
    add("--workers", type=int, default=flow.workers)
    add("--no-compile", action="store_true")
    add("--no-graphs", action="store_true", help="launch kernels singly")
    add("--time-parts", action="store_true", help="log the time of each part of a step")
    add("--checkpoint-seconds", type=float, default=flow.checkpoint_seconds)
    add("--evaluate-seconds", type=float, default=flow.evaluate_seconds)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the training that the command line asks for."""
    options = parse_arguments(arguments)
    from deployments.builtin.training_run import TrainingRun

    TrainingRun(options).run()


if __name__ == "__main__":
    main()
