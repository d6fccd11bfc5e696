"""The tensors of a compressed bank."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Compressed(NamedTuple):
    """A bank's experts as their mean and their differences from it, :mod:`dyconvert.nn.compress`.

    Attributes:
        mean: one expert's shape, such as `[C_out, C_in / groups, *kernel]`.
        differences: the bank's, such as `[g * C_out, C_in / groups, *kernel]`, of int8 or bfloat16.
        scale: the differences are multiplied by it, `[g, C_out]`; None for bfloat16.
    """

    mean: Tensor
    differences: Tensor
    scale: Tensor | None


def plain_linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor) -> Tensor:
    """A linear layer of compressed weights in plain operations, `[N, out_features]`."""
    weight = weight.to(bias.dtype)
    return F.linear(x, weight if scale is None else weight * scale.unsqueeze(1), bias)
