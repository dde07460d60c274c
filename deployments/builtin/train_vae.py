"""Training of the built-in autoencoder on drawn frames.

L1 keeps flat areas exact, an L1 on pixel differences keeps outlines, MSE punishes the few large
errors at letters' edges, and a light KL keeps latents in a range that diffusion likes. Crops make
the first three quarters cheap; whole frames of every aspect ratio follow, because attention and
group norms see other statistics there.
"""

import math
import random
import time
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch.nn import functional

from deployments.builtin.example_stream import ExampleStream, StreamSettings
from deployments.builtin.frame_pool import FramePool, PoolFiller
from deployments.builtin.training_log import Budget, StopRequest, TrainingLog

_KL_WEIGHT = 1e-3
_CROP_SHARE = 0.75  # of training, on crops


@dataclass(frozen=True, slots=True)
class VaeTraining:
    """How the autoencoder is trained.

    Attributes:
        steps: bound in steps, or None for a bound in seconds.
        seconds: bound in seconds.
        batch: crops in a step; whole frames come a quarter as many.
        crop: side of a crop in pixels.
        lr: peak learning rate of AdamW.
        reuse: steps' worth of batches that one drawn chunk serves.
        pool_chunks: chunks kept for each size.
        workers: processes that make scenes.
    """

    steps: int | None
    seconds: float
    batch: int = 128
    crop: int = 128
    lr: float = 1e-3
    reuse: int = 3
    pool_chunks: int = 8
    workers: int = 6


@dataclass(frozen=True, slots=True)
class LatentStatistics:
    """Of the encoder's means over all elements: what scaling and shift factors come from."""

    mean: float
    std: float


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + L1 of pixel differences + MSE, float32, of images in [-1, 1] [n, 3, h, w]."""
    error = output.float() - target
    edge = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + edge + error.square().mean()


def to_signed(frames: torch.Tensor) -> torch.Tensor:
    """Float32 in [-1, 1] from uint8 frames."""
    return frames.float() / 127.5 - 1.0


def to_frames(images: torch.Tensor) -> torch.Tensor:
    """Uint8 frames from images in [-1, 1]."""
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _crops(frames: torch.Tensor, side: int, rng: random.Random) -> torch.Tensor:
    """One random place for every group of eight frames: cheap, and varied enough."""
    height, width = frames.shape[-2:]
    side_down, side_right = min(side, height), min(side, width)
    pieces = []
    for group in torch.split(frames, 8):
        top = rng.randrange(height - side_down + 1)
        left = rng.randrange(width - side_right + 1)
        pieces.append(group[..., top : top + side_down, left : left + side_right])
    return torch.cat(pieces)


class VaeTrainer:
    """Trains an autoencoder in place.

    Args:
        vae: on the device it is trained on.
        training: how.
        stream: of which examples.
        log: where progress goes.
        stop: ends the loop early.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        training: VaeTraining,
        stream: StreamSettings,
        log: TrainingLog,
        stop: StopRequest,
    ) -> None:
        self.vae, self.training, self.log, self.stop = vae, training, log, stop
        self.device = next(vae.parameters()).device
        self.stream_settings = stream
        capacity = training.pool_chunks * stream.chunk
        self.pools = {
            size: FramePool(
                capacity,
                (3, *size),
                torch.uint8,
                stream.clip_length,
                stream.t5_length,
                self.device,
            )
            for size, _ in stream.sizes
        }
        self.generator = torch.Generator(self.device).manual_seed(stream.seed)

    def train(self) -> int:
        """Run until the budget is spent; returns the steps taken."""
        stream = ExampleStream(self.stream_settings, self.training.workers)
        filler = PoolFiller(self.pools, self.device, lambda frames: frames)
        try:
            for _ in self.stream_settings.sizes:
                filler.put(stream.take())
            return self._loop(stream, filler)
        finally:
            stream.close()

    def _loop(self, stream: ExampleStream, filler: PoolFiller) -> int:
        training = self.training
        cuda = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(
            self.vae.parameters(), lr=training.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=cuda
        )
        rng = random.Random(self.stream_settings.seed)
        sizes = [size for size, _ in self.stream_settings.sizes]
        weights = [weight for _, weight in self.stream_settings.sizes]
        every = max(1, training.reuse * self.stream_settings.chunk // training.batch)
        budget = Budget(training.steps, training.seconds)
        step, waited, reported = 0, 0.0, time.monotonic()
        self.vae.train()
        while (progress := budget.progress(step)) < 1 and not self.stop.asked:
            whole = progress >= _CROP_SHARE
            size = rng.choices(sizes, weights)[0]
            count = max(1, training.batch // 4) if whole else training.batch
            frames = self.pools[size].sample(count, self.generator)[0]
            images = to_signed(frames if whole else _crops(frames, training.crop, rng))
            loss = self._loss(images)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
            warm = min(1.0, (step + 1) / 100)
            for group in optimizer.param_groups:
                group["lr"] = training.lr * warm * (0.5 + 0.5 * math.cos(math.pi * progress))
            optimizer.step()
            step += 1
            if step % every == 0:
                before = time.monotonic()
                chunk = stream.take()
                waited += time.monotonic() - before
                filler.put(chunk)
            if time.monotonic() - reported > 5.0:
                value = float(loss.item())
                if not math.isfinite(value):
                    raise FloatingPointError(f"the autoencoder's loss is {value} at step {step}")
                self.log.write(
                    "vae",
                    step=step,
                    loss=value,
                    progress=progress,
                    ms_per_step=1000 * budget.elapsed_seconds / step,
                    waited_s=waited,
                )
                reported = time.monotonic()
        self.vae.eval()
        self.log.write("vae_trained", steps=step, seconds=budget.elapsed_seconds)
        return step

    def _loss(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            posterior = self.vae.encode(images).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=self.generator, device=self.device)
            output = self.vae.decode(mean + noise * (0.5 * logvar).exp()).sample
        divergence: torch.Tensor = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return reconstruction_loss(output, images) + _KL_WEIGHT * divergence


@torch.no_grad()
def encode_means(vae: AutoencoderKL, frames: torch.Tensor) -> torch.Tensor:
    """Means of uint8 frames [n, 3, h, w] as float32 [n, 16, h/8, w/8], not yet scaled."""
    device = frames.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        means: torch.Tensor = vae.encode(to_signed(frames)).latent_dist.mode().float()
    return means


@torch.no_grad()
def decode_frames(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Uint8 frames from unscaled latents [n, 16, h, w]."""
    device = latents.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return to_frames(vae.decode(latents).sample)


def latent_statistics(vae: AutoencoderKL, frames: list[torch.Tensor]) -> LatentStatistics:
    """Mean and standard deviation over the latents of some batches of frames."""
    flat = torch.cat([encode_means(vae, batch).flatten() for batch in frames])
    return LatentStatistics(mean=float(flat.mean()), std=float(flat.std()))


def peak_signal_to_noise(vae: AutoencoderKL, frames: torch.Tensor) -> float:
    """PSNR in dB of reconstructions of uint8 frames, as 8-bit pictures."""
    output = decode_frames(vae, encode_means(vae, frames))
    error = functional.mse_loss(output.float(), frames.float())
    return float(10 * torch.log10(255.0**2 / error.clamp(min=1e-6)))
