"""Group normalisation of a picture that is seen tile by tile: statistics of all of it first.

With statistics of its own each tile would have a tone of its own: on the built-in VAE 2.4/255 off
on average, seams apart, and repeated passes over the whole decoder come no nearer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CHANNELS_AT_ONCE = 64  # bounds the float32 copy


class ChannelStatistics:
    """Mean and variance of every channel over tiles that cover a picture once.

    Sums of squares are kept about the mean and joined by Chan, Golub and LeVeque's formula, in
    float64, so that they do not cancel.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean = torch.zeros(0)  # float64 [C]
        self._squares = torch.zeros(0)  # float64 [C], about the mean

    def add(self, tile: Tensor) -> None:
        """Take in a tile, [1, C, h, w]; nothing of it twice."""
        count = tile.shape[2] * tile.shape[3]
        parts = [
            torch.var_mean(part.float(), dim=(0, 2, 3), correction=0)
            for part in torch.split(tile, _CHANNELS_AT_ONCE, dim=1)
        ]
        squares, mean = (torch.cat(each).double() for each in zip(*parts, strict=True))
        squares = squares * count
        if self._count:
            total = self._count + count
            difference = mean - self._mean
            squares = self._squares + squares + difference**2 * (self._count * count / total)
            mean = self._mean + difference * (count / total)
            count = total
        self._count, self._mean, self._squares = count, mean, squares

    def normaliser(self, norm: nn.GroupNorm) -> Normaliser:
        """Return what `norm` does to tiles of the picture that these are the statistics of."""
        mean = self._mean.view(norm.num_groups, -1)
        squares = self._squares.view(norm.num_groups, -1)
        of_group = mean.mean(1, keepdim=True)
        # Channels of a group have equally many values.
        variance = (squares / self._count + (mean - of_group) ** 2).mean(1, keepdim=True)
        return Normaliser(
            norm,
            of_group.expand_as(mean).flatten().float(),
            variance.expand_as(mean).flatten().float(),
        )


class Normaliser:
    """Group normalisation with given statistics, then SiLU.

    Args:
        norm: Its groups' weights, bias and epsilon.
        mean: float32 [C].
        variance: float32 [C].
    """

    def __init__(self, norm: nn.GroupNorm, mean: Tensor, variance: Tensor) -> None:
        self._mean, self._variance = mean, variance
        self._weight, self._bias = norm.weight.float(), norm.bias.float()
        self._epsilon = norm.eps

    def __call__(self, tile: Tensor) -> Tensor:
        """Return a new tensor of the tile's shape and dtype; the arithmetic is float32."""
        normalised = F.batch_norm(
            tile,
            self._mean,
            self._variance,
            self._weight,
            self._bias,
            training=False,
            eps=self._epsilon,
        )
        return F.silu(normalised, inplace=True)
