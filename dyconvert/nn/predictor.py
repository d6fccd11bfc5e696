"""The coefficient predictor: pool -> linear(s) -> sigmoid | softmax(z / T)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyconvert.methods import Method
from dyconvert.nn.handing import maps_in


class CoefficientPredictor(nn.Module):
    r"""Predicts the coefficients of one conv, or of all the convs of a block, from one feature map.

    .. math:: \eta = \sigma(W_2\, \mathrm{ReLU}(W_1\, \mathrm{GAP}(x)) / T)

    with :math:`\sigma` the sigmoid (DyNet, eq. 3 and 4; CondConv, eq. 2) or the softmax over the experts
    (Dynamic Convolution, eq. 3 and section 3.3), and a single linear where the method has no reduction.

    The last linear starts at zero, so that all coefficients start equal. There is no batch norm here: it
    could not train with one image per device.

    Args:
        in_channels: channels of the feature map that is read.
        outputs: for each conv, how many coefficients an expert has: 1, or the conv's output channels.
        method: activation, temperature, reduction and g.

    Shape:
        - Input: `[N, in_channels, *spatial]`, or a list or dict of maps with `in_channels` channels in all
        - Output: one tensor `[N, g, outputs[i]]` for each conv i
    """

    def __init__(
        self,
        in_channels: int,
        outputs: Sequence[int],
        method: Method,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.outputs = tuple(outputs)
        self.g = method.g
        self.activation = method.activation
        self.initial_coefficient = method.initial_coefficient
        total = method.g * sum(self.outputs)
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
        self.linear = nn.Linear(hidden or in_channels, total, device="meta", dtype=dtype)
        # Stored with the inputs outermost: for few images a matmul reads it twice as fast so.
        self.linear.weight = nn.Parameter(_zeros(self.linear.weight.t()).t())
        self.linear.bias = nn.Parameter(_zeros(self.linear.bias))
        self.register_buffer("temperature", torch.tensor(method.temperature, dtype=dtype))

    def forward(self, x: Tensor | Any) -> tuple[Tensor, ...]:
        z = _pooled(x)  # [N, C]
        if self.hidden is not None:
            z = self.hidden(z).relu()
        z = self.linear(z) / self.temperature  # [N, g * sum(outputs)]
        if self.activation == "sigmoid":
            z = z.sigmoid()
        parts = []
        start = 0
        for channels in self.outputs:
            parts.append(z.narrow(1, start, self.g * channels).unflatten(1, (self.g, channels)))
            start += self.g * channels
        return tuple(parts if self.activation == "sigmoid" else [part.softmax(1) for part in parts])

    def extra_repr(self) -> str:
        return f"{self.in_channels}, outputs={self.outputs}, g={self.g}, activation={self.activation}"


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
