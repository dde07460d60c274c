"""Forward and backward of one training step, launched one by one or replayed as a CUDA graph.

The loss is rectified flow's (Liu et al., 2022; Esser et al., 2024): the transformer predicts the
velocity ``noise - latents`` at ``(1 - sigma) * latents + sigma * noise``. A model this small
spends more time launching kernels than running them; a graph of the whole forward and backward
takes the launches away. Gradients live at fixed addresses, so the graphs of several frame sizes
write the same ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from deployments.builtin.architecture import Parts
from deployments.builtin.conditioning import encode_tokens

_WARM_UP_STEPS = 3  # the compiler and the libraries' plans must be done before a capture


@dataclass(frozen=True, slots=True)
class StepInput:
    """What one step reads.

    Attributes:
        latents: float32 [n, 16, h, w], scaled and shifted.
        noise: float32, like latents.
        sigmas: float32 [n] in (0, 1).
        clip_ids: int64 [n, clip_length].
        t5_ids: int64 [n, t5_length].
    """

    latents: torch.Tensor
    noise: torch.Tensor
    sigmas: torch.Tensor
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The fields in order."""
        return self.latents, self.noise, self.sigmas, self.clip_ids, self.t5_ids


def velocity_loss(parts: Parts, step: StepInput, *, bfloat16: bool | None = None) -> torch.Tensor:
    """Mean squared error of the predicted velocity, float32 [].

    The autocast cache is off because a captured graph must not keep casts of weights that later
    steps change.

    Args:
        parts: the model.
        step: what it is tried on.
        bfloat16: whether to multiply in it; None does on a GPU.
    """
    device_type = step.latents.device.type
    half = device_type == "cuda" if bfloat16 is None else bfloat16
    with torch.autocast(device_type, torch.bfloat16, enabled=half, cache_enabled=False):
        embeds, pooled = encode_tokens(parts, step.clip_ids, step.t5_ids)
        sigmas = step.sigmas[:, None, None, None]
        predicted: torch.Tensor = parts.transformer(
            hidden_states=(1 - sigmas) * step.latents + sigmas * step.noise,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=step.sigmas * 1000,
            return_dict=False,
        )[0]
    loss: torch.Tensor = (predicted.float() - (step.noise - step.latents)).square().mean()
    return loss


class StepRunner:
    """Adds up a step's gradients and returns its loss.

    Args:
        parts: what is trained.
        gradient: float32 [elements], of which every parameter's gradient is a view.
        use_graphs: whether to capture one CUDA graph for each frame size.
        bfloat16: of ``velocity_loss``.
    """

    def __init__(
        self,
        parts: Parts,
        gradient: torch.Tensor,
        use_graphs: bool,
        bfloat16: bool | None = None,
    ) -> None:
        self.parts, self.gradient, self.bfloat16 = parts, gradient, bfloat16
        self.use_graphs = use_graphs and parts.device.type == "cuda"
        self._graphs: dict[tuple[int, ...], Callable[[StepInput], torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.use_graphs else None
        self._stream = torch.cuda.Stream() if self.use_graphs else None  # type: ignore[no-untyped-call]

    def __call__(self, step: StepInput) -> torch.Tensor:
        """Gradients of one step; the loss float32 [] is valid until the next call."""
        if not self.use_graphs:
            return self._launch(step)
        shape = tuple(step.latents.shape)
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(step)
        return self._graphs[shape](step)

    def _launch(self, step: StepInput) -> torch.Tensor:
        self.gradient.zero_()
        loss = velocity_loss(self.parts, step, bfloat16=self.bfloat16)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _capture(self, step: StepInput) -> Callable[[StepInput], torch.Tensor]:
        fixed = StepInput(*(tensor.clone() for tensor in step.tensors()))
        stream = self._stream
        if stream is None:
            raise RuntimeError("graphs are captured on a GPU only")
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                self._launch(fixed)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads' CUDA calls (none of them ours) must not spoil a capture.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):
            loss = self._launch(fixed)

        def replay(current: StepInput) -> torch.Tensor:
            torch._foreach_copy_(list(fixed.tensors()), list(current.tensors()))
            graph.replay()
            return loss

        return replay
