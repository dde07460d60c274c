"""Muon for the matrices, AdamW for the rest, and an average of the weights.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) replaces a matrix's momentum
by the nearest orthogonal matrix. A small model has many small matrices of few shapes, and one by
one their Newton-Schulz iterations are thousands of tiny launches; here the matrices of one shape
are stacked and orthogonalised in one batch, which computes the same thing.
"""

from collections.abc import Iterable

import torch
from torch import nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# elements: fused kernels read 16 bytes at once, cuBLAS likes 128
_ALIGNMENT = 32


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Nearest orthogonal matrices, roughly: singular values end between about 0.7 and 1.2.

    Args:
        matrices: [batch, rows, columns], any floating type.

    Returns:
        bfloat16 [batch, rows, columns].
    """
    a, b, c = _NEWTON_SCHULZ
    x: torch.Tensor = matrices.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    return x.mT if tall else x


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    if parameter.grad is None:
        raise ValueError("gradients must be allocated before the first step")
    return parameter.grad


def _allocate_gradients(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Give each parameter a zero gradient inside one buffer, which is returned."""
    sizes = [-(-p.numel() // _ALIGNMENT) * _ALIGNMENT for p in parameters]
    flat = torch.zeros(sum(sizes), device=parameters[0].device)
    for parameter, piece in zip(parameters, torch.split(flat, sizes), strict=True):
        parameter.grad = piece[: parameter.numel()].view(parameter.shape)
    return flat


class BatchedMuon:
    """Muon with Nesterov momentum over matrices stacked by shape.

    The update's root mean square is ``0.2 * lr`` per element whatever the shape (Liu et al.,
    2025, "Muon is scalable"), so a learning rate near AdamW's fits.

    Args:
        parameters: two-dimensional weights whose ``grad`` is allocated.
        momentum: of the gradient's running average.
        weight_decay: decoupled, times the learning rate.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
        self.groups: list[list[torch.Tensor]] = [list(group) for group in by_shape.values()]
        self.momentum = momentum
        self.weight_decay = weight_decay
        # float32 [matrices, rows, columns] for each group
        self.buffers = [
            torch.zeros((len(group), *group[0].shape), device=group[0].device)
            for group in self.groups
        ]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply one update from the parameters' gradients."""
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradient = torch.stack([_gradient(parameter) for parameter in group])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp_(buffer, self.momentum)).float()
            update.mul_(-0.2 * lr * max(buffer.shape[-2:]) ** 0.5)
            torch._foreach_mul_(group, 1 - lr * self.weight_decay)
            torch._foreach_add_(group, tuple(update.unbind(0)))


class WeightAverage:
    """Exponential moving average of parameters, which begins short so it forgets the start.

    Args:
        parameters: what is averaged.
        decay: of the average once it has run for a while.
    """

    def __init__(self, parameters: list[torch.Tensor], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.average = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after ``step`` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes a parameter: the Linear weights inside blocks and text layers."""
    inside = any(
        part in name for part in ("transformer_blocks.", "encoder.layers.", "encoder.block.")
    )
    return inside and parameter.ndim == 2 and "relative_attention_bias" not in name


class Optimizer:
    """Muon and AdamW under one schedule.

    Every gradient is a view of one flat buffer that stays where it is, so that a captured graph may
    write it and one all-reduce averages all of them over several GPUs.

    Args:
        model: what is trained.
        muon_lr: peak learning rate of the matrices.
        adam_lr: peak learning rate of the rest.
        weight_decay: of the matrices.
        clip_norm: largest norm of all gradients together.
    """

    def __init__(
        self,
        model: nn.Module,
        muon_lr: float,
        adam_lr: float,
        weight_decay: float,
        clip_norm: float = 1.0,
    ) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.parameters: list[torch.Tensor] = [parameter for _, parameter in named]
        # float32 [elements], the gradients one after the other, zeros between them
        self.flat_gradient = _allocate_gradients(self.parameters)
        self.muon = BatchedMuon((p for n, p in named if is_matrix(n, p)), weight_decay=weight_decay)
        self.adam = torch.optim.AdamW(
            [parameter for name, parameter in named if not is_matrix(name, parameter)],
            lr=adam_lr,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=self.parameters[0].device.type == "cuda",
        )
        self.muon_lr, self.adam_lr, self.clip_norm = muon_lr, adam_lr, clip_norm

    @torch.no_grad()
    def step(self, factor: float) -> torch.Tensor:
        """Clip, then update with both learning rates times ``factor``.

        Returns:
            float32 [], the norm of all gradients before clipping; no synchronisation.
        """
        norm: torch.Tensor = self.flat_gradient.norm()
        self.flat_gradient.mul_((self.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        self.muon.step(self.muon_lr * factor)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * factor
        self.adam.step()
        return norm

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that a later ``load_state_tensors`` needs, by a flat name."""
        state = {f"muon.{i}": buffer for i, buffer in enumerate(self.muon.buffers)}
        adam = self.adam.state_dict()["state"]
        for index, entry in adam.items():
            for key, value in entry.items():
                state[f"adam.{index}.{key}"] = torch.as_tensor(value)
        return state

    def load_state_tensors(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of ``state_tensors``.

        Raises:
            KeyError: the state is of a model of another shape.
        """
        for index, buffer in enumerate(self.muon.buffers):
            buffer.copy_(state[f"muon.{index}"])
        whole = self.adam.state_dict()
        whole["state"] = {
            index: {
                key: state[f"adam.{index}.{key}"].clone()
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
            for index in whole["param_groups"][0]["params"]
            if f"adam.{index}.step" in state
        }
        self.adam.load_state_dict(whole)
