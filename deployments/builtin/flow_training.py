"""How the transformer and the text encoders are trained: the numbers, and the learning rate.

The defaults are what the runs in ``training_record`` taught; the reasons stand beside them.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FlowTraining:
    """How the transformer and the text encoders are trained.

    Attributes:
        steps: bound in steps, or None for a bound in seconds.
        seconds: bound in seconds.
        batch: rows in a step, of all GPUs together.
        muon_lr: peak learning rate of block and text matrices.
        adam_lr: peak learning rate of everything else.
        weight_decay: of the matrices, decoupled.
        warmup_steps: until the peak.
        hold: share of the budget at the peak; a cosine to zero follows.
        ema_decay: of the weight average that is exported.
        caption_dropout: share of rows whose prompts become empty, for guidance.
        time_mean: of the logit-normal distribution of times.
        time_std: of the same.
        reuse: how often a drawn row is used on average.
        pool_chunks: chunks kept of the most frequent size; the others keep a quarter.
        workers: processes that make scenes.
        compile_blocks: compile each transformer block.
        graphs: capture forward and backward as CUDA graphs.
        checkpoint_seconds: between checkpoints.
        evaluate_seconds: between evaluations.
        time_parts: log how long the parts of a step take, before the first; moments of the
            optimizers then begin a little warm.
    """

    steps: int | None = None
    # On four H100s, 9,333 steps. One takes 2,400 s for as many.
    seconds: float = 600.0
    batch: int = 1024
    # In 45 s from nothing: loss 0.104 at 2.5e-3, 0.172 at 1e-3.
    muon_lr: float = 2.5e-3
    adam_lr: float = 1.5e-3
    weight_decay: float = 0.01
    warmup_steps: int = 150
    hold: float = 0.35
    ema_decay: float = 0.999
    caption_dropout: float = 0.1
    # Samplers with shift 3 spend a quarter of their steps above 0.9, and decide there what goes
    # where. Logit-normal (0.8, 1.3) trains a seventh of the times there. With (0, 1) it is 1.4 %:
    # after 2963 steps backgrounds, positions and relations were at chance under sharp outlines.
    time_mean: float = 0.8
    time_std: float = 1.3
    # Drawing and encoding 512 rows takes 220 ms beside steps of 86 ms on one GPU. At 5 uses a row
    # that slows a step to 107 ms, at 12 not at all; nor does 8 with a quarter of the rows a GPU.
    reuse: int = 8
    pool_chunks: int = 16
    workers: int = 6
    compile_blocks: bool = True
    graphs: bool = True
    checkpoint_seconds: float = 240.0
    evaluate_seconds: float = 120.0
    time_parts: bool = False


def learning_rate_factor(step: int, progress: float, training: FlowTraining) -> float:
    """Share of the peak learning rate: warm-up, constant, cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, training.warmup_steps))
    if progress <= training.hold:
        return warm
    fall = (progress - training.hold) / (1 - training.hold)
    return warm * (0.5 + 0.5 * math.cos(math.pi * fall))
