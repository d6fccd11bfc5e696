"""The coefficient predictor: pool -> linear(s) -> sigmoid(z / T) | softmax(z / T)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyconvert.methods import Method
from dyconvert.nn.handing import maps_in
from dyconvert.nn.linear import predictor_linear
from dyconvert.nn.mixture import Mixture, Sizes


class CoefficientPredictor(nn.Module):
    r"""Predicts the coefficients of one conv, or of all the convs of a block, from one feature map.

    .. math:: \eta = \sigma(W_2\, \mathrm{ReLU}(W_1\, \mathrm{GAP}(x)) / T)

    with :math:`\sigma` the sigmoid (DyNet, eq. 3 and 4; CondConv, eq. 2) or the softmax over the experts
    (Dynamic Convolution, eq. 3 and section 3.3), and a single linear where the method has no reduction. Factors of
    channels and positions are :math:`2 \sigma(z / T)` (ODConv, section 3.2, whose sigmoid is not doubled: the two would
    be in the experts).

    The last linear starts at zero, so that all coefficients start equal, and all factors at 1. There is no batch norm
    here: it could not train with one image per device. Where ODConv has one, this has a layer norm.

    Args:
        in_channels: channels of the feature map that is read.
        sizes: for each conv, how many numbers it is given along each axis.
        method: activation, temperature, the hidden layer and g.

    Shape:
        - Input: `[N, in_channels, *spatial]`, or a list or dict of maps with `in_channels` channels in all
        - Output: one :class:`~dyconvert.nn.mixture.Mixture` for each conv, of `sizes[i]`
    """

    def __init__(
        self,
        in_channels: int,
        sizes: Sequence[Sizes],
        method: Method,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.sizes = tuple(sizes)
        self.g = method.g
        self.activation = method.activation
        self.initial_coefficient = method.initial_coefficient
        total = sum(size.total for size in self.sizes)
        hidden = method.hidden_features(in_channels)
        if hidden is None:
            self.hidden = None
        else:
            self.hidden = nn.utils.skip_init(nn.Linear, in_channels, hidden, dtype=dtype)
            # As nn.Linear does, but from our own generator: converting must not disturb the global one.
            bound = in_channels**-0.5
            with torch.no_grad():
                self.hidden.weight.uniform_(-bound, bound, generator=generator)
                self.hidden.bias.uniform_(-bound, bound, generator=generator)
        self.norm = nn.LayerNorm(hidden, dtype=dtype) if hidden is not None and method.normalised else None
        self.linear = predictor_linear(hidden or in_channels, total, dtype)
        self.linear.weight = nn.Parameter(_zeros(self.linear.weight))
        self.linear.bias = nn.Parameter(_zeros(self.linear.bias))
        self.register_buffer("temperature", torch.tensor(method.temperature, dtype=dtype))

    def forward(self, x: Tensor | Any) -> tuple[Mixture, ...]:
        return self.of_pooled(_pooled(x))

    def of_pooled(self, z: Tensor) -> tuple[Mixture, ...]:
        """The mixtures for an input that is pooled already, `[N, in_channels]`."""
        if self.hidden is not None:
            z = self.hidden(z)
            z = (z if self.norm is None else self.norm(z)).relu()
        z = self.linear(z) / self.temperature  # [N, sum of all sizes]
        factors = any(size.factors for size in self.sizes)
        sigmoids = z.sigmoid() if factors or self.activation == "sigmoid" else z
        mixtures = []
        start = 0
        for size in self.sizes:
            mixtures.append(self._mixture(size, z, sigmoids, start))
            start += size.total
        return tuple(mixtures)

    def _mixture(self, size: Sizes, z: Tensor, sigmoids: Tensor, start: int) -> Mixture:
        """The mixture of one conv, from the logits from `start` on."""
        count = size.g * size.per
        if not count:
            experts = z.new_ones(z.shape[0], 1, 1)
        elif self.activation == "sigmoid":
            experts = sigmoids.narrow(1, start, count).unflatten(1, (size.g, size.per))
        else:
            experts = z.narrow(1, start, count).unflatten(1, (size.g, size.per)).softmax(1)
        start += count
        factors = []
        for length in size.factors:
            factors.append(2 * sigmoids.narrow(1, start, length) if length else None)
            start += length
        return Mixture(experts, *factors)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {len(self.sizes)} convs, g={self.g}, activation={self.activation}"


def _pooled(x: Any) -> Tensor:
    """The mean over the pixels of a map `[N, C, *spatial]`, or of several maps, one after the other: `[N, C]`."""
    if not isinstance(x, (list, tuple, Mapping)):
        return x.flatten(2).mean(2)
    maps = [m.flatten(2).mean(2) for m in maps_in(x)]
    return torch.cat(maps, 1) if len(maps) > 1 else maps[0]


def _zeros(like: Tensor) -> Tensor:
    """Zeros on the CPU, of pages that the system makes when they are first written: they can be many, and
    writing them all took a quarter of a conversion's time."""
    return torch.from_numpy(np.zeros(like.numel() * like.itemsize, np.uint8)).view(like.dtype).view(like.shape)
