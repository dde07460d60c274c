"""What travels between the stages: one frozen type an arrow, numpy only.

The Pipeline carries these without torch. numpy has no bfloat16, so a uint16 array means the raw
bits of bfloat16 (`deployments.sd3.wire` converts); float32 arrays are themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cluster.pool_state import ReplicaState
from deployments.sd3.sigmas import steps_taken

Array = NDArray[np.float32] | NDArray[np.uint16]

Path = Literal["graph", "eager"]
"""How a forward ran: replayed from a captured CUDA graph, or launched kernel by kernel."""


@dataclass(frozen=True)
class Stamp:
    """Who did a piece of work and how long it took."""

    replica: str
    pid: int
    precision: str
    queue_s: float
    seconds: float


@dataclass(frozen=True)
class LoraUse:
    """One LoRA of a request."""

    name: str  # as the library lists it
    weight: float
    version: str = ""  # of the file's content, as the Pipeline found it: a new one is read anew


@dataclass(frozen=True)
class TextJob:
    """Pipeline -> TextEncoder: one prompt as the three encoders get it."""

    prompt: str  # CLIP-L
    prompt_2: str  # CLIP-G
    prompt_3: str  # T5
    max_sequence_length: int  # T5 tokens
    loras: tuple[LoraUse, ...] = ()  # those with a part for text encoders


@dataclass(frozen=True)
class PromptEmbedding:
    """TextEncoder -> Denoiser: one encoded prompt."""

    prompt_embeds: Array  # [tokens, joint_attention_dim]
    pooled_prompt_embeds: Array  # [pooled_projection_dim]
    warnings: tuple[str, ...]  # e.g. what was truncated
    stamp: Stamp
    load: ReplicaState | None = None  # of the replica that answers, then
    tokens: int | None = None  # that the longest encoder saw; None: a replica that does not count


@dataclass(frozen=True)
class EncodedImage:
    """VaeDecoder -> Denoiser: a start image as the VAE's encoder sees it, for image-to-image.

    A normal distribution of latents, as the model samples them; each picture draws from it.
    """

    mean: NDArray[np.float32]  # [channels, height / 8, width / 8]
    std: NDArray[np.float32]  # as mean
    stamp: Stamp
    load: ReplicaState | None = None  # of the replica that answers, then


@dataclass(frozen=True)
class Checkpoint:
    """Denoiser -> Pipeline -> another Denoiser: a picture between two of its steps.

    All that the steps to come need beside the job itself: guidance depends on the step alone. At
    1024x1024 it takes 1 MiB, and 2 MiB with a multistep sampler's history.
    """

    version: int  # of this type; who knows another one starts from the first step
    step: int  # finished: 1 to steps - 1
    steps: int  # that the picture takes; image-to-image takes the last ones of its run
    sampler: str
    scheduler: str
    shift: float
    seed: int
    latents: NDArray[np.float32]  # [channels, height / 8, width / 8]
    previous: NDArray[np.float32] | None  # as latents: what a multistep sampler remembers
    generator: NDArray[np.uint8]  # [bytes] state of torch's CPU generator: noise to come
    strength: float = 1.0


@dataclass(frozen=True)
class Handover:
    """Denoiser -> Pipeline, instead of latents: this replica goes, the picture is to go on."""

    checkpoint: Checkpoint | None  # None: it had not begun


@dataclass(frozen=True)
class DenoiseJob:
    """Pipeline -> Denoiser: one picture. `negative` is None when guidance_scale <= 1."""

    job_id: str
    image: int
    width: int  # pixels
    height: int  # pixels
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    scheduler: str
    shift: float
    seed: int
    positive: PromptEmbedding
    negative: PromptEmbedding | None
    priority: int = 0  # higher first
    deadline_s: float | None = None  # seconds left when submitted; None: no deadline
    guidance_interval: tuple[float, float] | None = None
    """Sigmas, low < high: outside [low, high] only the conditional row is computed."""
    negative_prompt_range: tuple[float, float] = (0.0, 1.0)
    """Fractions of sampling: outside it the unconditional row's embeddings are zeros."""
    preview_every: int = 0  # steps; 0: no previews
    alone: bool = False  # with no other job in the replica: one died while it worked on this
    loras: tuple[LoraUse, ...] = ()  # those with a part for the transformer
    resume: Checkpoint | None = None  # where it goes on; None: from the start
    init: EncodedImage | None = None  # what it starts from, noised; None: from pure noise
    strength: float = 1.0  # of init: the share of the steps that are taken, the last ones
    traceparent: str | None = None  # W3C's, of the span that it is done for; None: not traced

    @property
    def steps(self) -> int:
        """Steps that it takes in all, but for those that a scheduler drops."""
        return steps_taken(self.num_inference_steps, self.strength)

    @property
    def steps_left(self) -> int:
        """Steps that it still needs."""
        return self.steps - (self.resume.step if self.resume else 0)


@dataclass(frozen=True)
class StepProgress:
    """Denoiser -> Pipeline, streamed after each step."""

    step: int  # finished, 1-based
    steps: int
    seconds: float  # of this step
    preview: NDArray[np.uint8] | None = None  # [height / 8, width / 8, 3] RGB
    path: Path = "eager"  # how this step's forward ran
    load: ReplicaState | None = None  # of the replica, once for each item of the stream
    checkpoint: Checkpoint | None = None  # of an earlier step, every few steps


@dataclass(frozen=True)
class Latents:
    """Denoiser -> VaeDecoder (the last item of the stream): one denoised picture.

    `moves` and `steps_repeated` are the Pipeline's, who alone knows of all denoisers.
    """

    latents: NDArray[np.float32]  # [channels, height / 8, width / 8], as the model samples them
    stamp: Stamp
    joules: float | None = None  # this picture's share of the card's energy; None: not known
    load: ReplicaState | None = None  # of the replica, then
    cool_s: float | None = None  # its work here, alone on the cool card; None: not known
    moves: int = 0  # times that it went on with another denoiser
    steps_repeated: int = 0  # because they came after the checkpoint it went on from


DenoiseEvent = StepProgress | Latents | Handover
"""What a denoiser streams; all but StepProgress ends the stream."""


@dataclass(frozen=True)
class Pixels:
    """VaeDecoder -> Pipeline: one picture."""

    pixels: NDArray[np.uint8]  # [height, width, 3] RGB
    stamp: Stamp
    load: ReplicaState | None = None  # of the replica, then
