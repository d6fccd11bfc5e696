"""The ways to compute a dynamic conv in plain, differentiable operations, each for any shape.

Convolution is linear, so mixing kernels equals mixing feature maps,
``sum_i eta_i (w_i * x) = (sum_i eta_i w_i) * x`` (DyNet, eq. 5), at 1/g of the cost. The operands' shift is left to
the caller.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dyconvert.nn.mixing import kernels_of, mix
from dyconvert.nn.operands import Geometry, Operands
from dyconvert.nn.padding import amounts_of_padding

CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def mixed(operands: Operands) -> tuple[Tensor, Tensor | None]:
    """Each image's kernel `[N, C_out, C_in / groups, *kernel]` and bias `[N, C_out]`."""
    _, weight, bias, mixing, *_ = operands
    kernel = kernels_of(weight.unflatten(0, (mixing.g, -1)), mixing)
    return kernel, None if bias is None else mix(bias.unflatten(0, (mixing.g, -1)), mixing.coefficients)


def groups(operands: Operands) -> Tensor:
    """One conv for the batch: its images are the groups of a single image."""
    x, geometry = operands.x, operands.geometry
    kernel, mixed_bias = mixed(operands)
    batch = x.shape[0]
    out = CONV[x.dim() - 2](
        x.reshape(1, -1, *x.shape[2:]),
        kernel.flatten(0, 1),
        None if mixed_bias is None else mixed_bias.flatten(),
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups * batch,
    )
    return out.unflatten(1, (batch, -1)).squeeze(0)


def unfold(operands: Operands) -> Tensor:
    """One batched matmul of the kernels with the unfolded input.

    Nothing in it depends on the number of images, so it exports with a dynamic batch.
    """
    geometry = operands.geometry
    kernel, mixed_bias = mixed(operands)
    rows, spatial = unfolded(operands.x, kernel.shape[3:], geometry)
    matrix = kernel.flatten(2).unflatten(1, (geometry.groups, -1))  # [N, groups, C_out / groups, C_in / groups taps]
    if matrix.shape[2] == 1 and matrix.shape[3] <= 64:
        # Depthwise: a matmul of one row. Summing the taps is less work than packing it.
        out = (matrix.transpose(2, 3) * rows).sum(2)  # [N, groups, L]
    else:
        out = (matrix @ rows).flatten(1, 2)  # [N, C_out, L]
    if mixed_bias is not None:
        out = out + mixed_bias.unsqueeze(2)
    return out.unflatten(2, spatial)


def unfolded(x: Tensor, kernel_size: Sequence[int], geometry: Geometry) -> tuple[Tensor, Sequence[int]]:
    """The elements that a kernel is multiplied with at each pixel, `[N, groups, C_in / groups * taps, L]`; the output's
    size."""
    taps = shifted(x, kernel_size, geometry)  # k1 k2 ... x [N, C_in, *out]
    spatial = taps[0].shape[2:]
    rows = taps[0] if len(taps) == 1 else torch.stack(taps, 2)  # [N, C_in, taps, *out]
    rows = rows.unflatten(1, (geometry.groups, -1)).flatten(2, -1 - len(spatial)).flatten(3)
    return rows, spatial


def features(operands: Operands) -> Tensor:
    """Mix feature maps instead of kernels: how DyNet's paper trains (eq. 5), at g times the work and memory.

    Maps of half precision are added up in float32, so that their sum is rounded once.
    """
    x, weight, bias, mixing, geometry, _ = operands
    g = mixing.g
    coefficients = mixing.coefficients.to(torch.promote_types(x.dtype, torch.float32))
    experts = weight.chunk(g)
    biases = [None] * g if bias is None else bias.chunk(g)
    rows = spatial = out = None
    if mixing.factors is not None:  # they multiply what each element of a kernel meets
        rows, spatial = unfolded(x, weight.shape[2:], geometry)
        rows = rows * mixing.factors.flatten(2).unsqueeze(3)
    for index, (expert, own_bias) in enumerate(zip(experts, biases, strict=True)):
        if rows is None:
            y = CONV[x.dim() - 2](x, expert, own_bias, *geometry)
        else:
            y = (expert.flatten(1).unflatten(0, (geometry.groups, -1)) @ rows).flatten(1, 2).unflatten(2, spatial)
            y = y if own_bias is None else y + own_bias.view(-1, *[1] * len(spatial))
        eta = coefficients[:, index].reshape(x.shape[0], -1, *[1] * (x.dim() - 2))
        out = eta * y if out is None else out + eta * y
    return out.to(x.dtype)


def shifted(x: Tensor, kernel_size: Sequence[int], geometry: Geometry) -> list[Tensor]:
    """The part of the padded input that each tap of a kernel meets: views `[N, C_in, *out]`, last dim fastest."""
    dims = len(kernel_size)
    amounts = amounts_of_padding(kernel_size, geometry.padding, geometry.dilation)
    if any(amounts):
        x = F.pad(x, amounts)
    taps = [x]
    for dim in range(dims):
        reach = geometry.dilation[dim] * (kernel_size[dim] - 1)
        length = x.shape[2 + dim] - reach
        starts = [geometry.dilation[dim] * k for k in range(kernel_size[dim])]
        taps = [_narrow(tap, 2 + dim, start, length, geometry.stride[dim]) for tap in taps for start in starts]
    return taps


def _narrow(x: Tensor, dim: int, start: int, length: int, step: int) -> Tensor:
    index = (slice(None),) * dim + (slice(start, start + length, step),)
    return x[index]
