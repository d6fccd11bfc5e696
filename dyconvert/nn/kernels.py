"""Dynamic convolution: mix each image's kernel from the bank, then convolve with it.

Convolution is linear, so mixing kernels equals mixing feature maps,
``sum_i eta_i (w_i * x) = (sum_i eta_i w_i) * x`` (DyNet, eq. 5), at 1/g of the cost.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def mix(bank: Tensor, coefficients: Tensor) -> Tensor:
    r"""The kernel of each image, :math:`\tilde w_t = \sum_i \eta_t^i w_t^i` (DyNet, eq. 1).

    Args:
        bank: the experts, `[g, C_out, ...]`.
        coefficients: `[N, g, 1]`, or `[N, g, C_out]` for a coefficient per output channel.

    Returns:
        `[N, C_out, ...]`
    """
    g, channels = bank.shape[:2]
    flat = bank.reshape(g, channels, -1)
    if coefficients.shape[2] == 1:
        mixed = coefficients.flatten(1) @ flat.flatten(1)  # [N, g] @ [g, C_out K]
    else:
        mixed = torch.einsum("ngt,gtk->ntk", coefficients, flat)
    return mixed.view(-1, *bank.shape[1:])


def dynamic_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficients: Tensor,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolve every image with the kernel that its own coefficients mix.

    Args:
        x: `[N, C_in, *spatial]`
        weight: the bank, `[g * C_out, C_in / groups, *kernel]`, expert by expert.
        bias: `[g * C_out]` or None.
        coefficients: `[N, g, 1]` or `[N, g, C_out]`.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`.

    Returns:
        `[N, C_out, *spatial]`
    """
    g = coefficients.shape[1]
    kernel = mix(weight.unflatten(0, (g, -1)), coefficients)  # [N, C_out, C_in / groups, *kernel]
    mixed_bias = None if bias is None else mix(bias.unflatten(0, (g, -1)), coefficients).flatten()
    # One conv for the batch: its images are the groups of a single image.
    out = _CONV[x.dim() - 2](
        x.reshape(1, -1, *x.shape[2:]),
        kernel.flatten(0, 1),
        mixed_bias,
        stride,
        padding,
        dilation,
        groups * x.shape[0],
    )
    return out.unflatten(1, (x.shape[0], -1)).squeeze(0)
