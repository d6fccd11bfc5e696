"""The patches of a layer's input that its weights are multiplied with, at the sampled rows of its output."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyconvert.narrowing.positions import Positions
from dyconvert.nn.padding import TF_SAME, amounts_of_padding, pad_tf_same
from dyconvert.surgery.adapters import static_padding
from dyconvert.torch_internals.modules import ConvTransposeNd


def patches(layer: nn.Module, x: Tensor, positions: Positions, shape: tuple[int, ...], calls: int = 1) -> Tensor:
    """The inputs of each sampled row of the output.

    Args:
        x: the layer's input.
        shape: the shape of its output.

    Returns:
        `[P, groups, F]`, F in the order of :func:`as_rows`.
    """
    if isinstance(layer, nn.Linear):
        return positions.take(x, channels_first=False, calls=calls).unsqueeze(1)
    if isinstance(layer, ConvTransposeNd):
        x, stride = _with_zeros_between(layer, x, shape[2:]), (1,) * len(layer.kernel_size)
    else:
        x, stride = _padded(layer, x), layer.stride
    leading = (len(x), *shape[2:])
    rows = positions.of(math.prod(leading), calls).to(x.device)
    image, *place = torch.unravel_index(rows, leading)
    starts = [p * step for p, step in zip(place, stride, strict=True)]
    geometry = zip(layer.kernel_size, layer.dilation, strict=True)
    offsets = torch.cartesian_prod(*(torch.arange(kernel) * dilation for kernel, dilation in geometry))
    channels_last = x.movedim(1, -1)
    samples = [
        channels_last[(image, *(s + int(o) for s, o in zip(starts, offset, strict=True)))]
        for offset in offsets.view(-1, len(layer.kernel_size))
    ]
    return torch.stack(samples, 2).unflatten(1, (layer.groups, -1)).flatten(2)


def _padded(conv: nn.Module, x: Tensor) -> Tensor:
    padding = static_padding(conv)
    if padding == TF_SAME:
        return pad_tf_same(x, conv.kernel_size, conv.stride, conv.dilation)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, amounts_of_padding(conv.kernel_size, padding, conv.dilation), mode=mode)


def _with_zeros_between(conv: nn.Module, x: Tensor, size: tuple[int, ...]) -> Tensor:
    """A transposed conv's input with zeros between and around its pixels: a conv with the flipped kernel reads it."""
    widened = x.new_zeros(*x.shape[:2], *((s - 1) * step + 1 for s, step in zip(x.shape[2:], conv.stride, strict=True)))
    widened[(slice(None), slice(None), *(slice(None, None, step) for step in conv.stride))] = x
    amounts: list[int] = []
    for had, out_size, kernel, pad, dilation in zip(
        widened.shape[2:], size, conv.kernel_size, conv.padding, conv.dilation, strict=True
    ):
        reach = dilation * (kernel - 1)
        amounts = [
            reach - pad,
            out_size + reach - had - (reach - pad),
            *amounts,
        ]  # F.pad takes the last dimension first
    return F.pad(widened, amounts)


def as_rows(layer: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight as `[C_out, F]`: each output channel's factors for its patches."""
    if isinstance(layer, ConvTransposeNd):
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
        return weight.flip(tuple(range(2, weight.dim()))).flatten(1)
    return weight.flatten(1)


def as_weight(layer: nn.Module, rows: Tensor) -> Tensor:
    """The inverse of :func:`as_rows`: `[C_out, F]` in the shape of the layer's weight."""
    if isinstance(layer, ConvTransposeNd):
        weight = rows.unflatten(1, (-1, *layer.kernel_size))
        weight = weight.flip(tuple(range(2, weight.dim())))
        return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return rows.view_as(layer.weight)
