"""Plain operations that keep no image's kernel for backward: an engine for every device, dtype and number of dims.

Autograd keeps what a backward needs. Of a dynamic conv that would be every image's kernel: 24 GB for ResNet50 at 256
images in float32. The engine is run without autograd instead, and mixes the kernels again for backward, of so many
images at a time that they take little memory beside the maps.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dyconvert.nn import strategies
from dyconvert.nn.mixing import by_factors, factor_gradient, mix
from dyconvert.nn.mixture import Mixing
from dyconvert.nn.operands import Geometry, Gradients, Needs, Operands
from dyconvert.torch_internals.operators import gradients_of_images

# At most this many bytes of kernels, their gradients and unfolded inputs exist at the same time. A GPU has many times
# this memory; with much less, each matmul of large kernels would have few images.
_BYTES = 512 * 2**20

STRATEGIES = {"groups": strategies.groups, "unfold": strategies.unfold}


def by_rule(operands: Operands) -> str:
    """The strategy that is likely to be the faster: "unfold" where one batched matmul is the whole conv, 1 x 1 of
    several images, else "groups"; of no images "unfold", which makes no pieces of the batch."""
    weight, geometry = operands.weight, operands.geometry
    batch = operands.x.shape[0]
    if isinstance(batch, int) and batch < 2:
        return "unfold" if batch == 0 else "groups"
    return "unfold" if weight.shape[2:].numel() == 1 and geometry.groups == 1 else "groups"


def forward(operands: Operands, how: str) -> Tensor:
    """A dynamic conv without autograd.

    Args:
        operands: padding may also be "same" or "valid".
        how: "groups" or "unfold", the strategy.
    """
    x, weight, bias, mixing, geometry, shift = operands
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    images = _images_at_a_time(x, weight, mixing, how, gradients=False)
    strategy = STRATEGIES[how]
    parts = [
        strategy(Operands(x[part], weight, bias, mixing.part(part), geometry)) for part in _parts(x.shape[0], images)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out if shift is None else out + shift.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


def backward(grad: Tensor, operands: Operands, needs: Needs, how: str) -> Gradients:
    """Those gradients that are needed; without autograd."""
    x, weight, _, mixing, geometry, _ = operands
    bank = weight.unflatten(0, (mixing.g, -1))  # [g, C_out, C_in / groups, *kernel]
    gradients = _unfolded_gradients if how == "unfold" else _grouped_gradients
    parts_x, parts_eta, parts_factors = [], [], []
    grad_bank: Tensor | None = None
    for part in _parts(x.shape[0], _images_at_a_time(x, weight, mixing, how, gradients=True)):
        eta, factors = mixing.part(part)
        plain = mix(bank, eta)  # [n, C_out, C_in / groups, *kernel]
        kernels = plain if factors is None else by_factors(plain, factors)
        grad_x, grad_kernels = gradients(
            grad[part], x[part], kernels, geometry, needs_x=needs.x, needs_kernels=needs.kernels
        )
        if needs.factors:
            parts_factors.append(factor_gradient(plain, grad_kernels, factors.shape[1]))
        if factors is not None and grad_kernels is not None:
            grad_kernels = by_factors(grad_kernels, factors)
        if needs.x:
            parts_x.append(grad_x)
        if needs.weight:
            part_bank = _bank_gradient(grad_kernels, eta)
            # Half precision is too coarse to add up in.
            grad_bank = part_bank if grad_bank is None else grad_bank.to(_wide(x.dtype)).add_(part_bank)
        if needs.coefficients:
            parts_eta.append(_coefficient_gradient(bank, grad_kernels, mixing.per_channel))
    return Gradients(
        _together(parts_x),
        None if grad_bank is None else grad_bank.to(weight.dtype).view(weight.shape),
        _together(parts_eta),
        _together(parts_factors),
    )


def _together(parts: list[Tensor]) -> Tensor | None:
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def _images_at_a_time(x: Tensor, weight: Tensor, mixing: Mixing, how: str, *, gradients: bool) -> int:
    image = weight.numel() // mixing.g
    if how == "unfold":
        image += weight.shape[2:].numel() * x.shape[1:].numel()
    most = _BYTES // max(image * x.element_size() * (2 if gradients else 1), 1)
    return max(min(most, x.shape[0]), 1)


def _parts(images: int, at_a_time: int) -> Iterator[slice]:
    for first in range(0, max(images, 1), at_a_time):
        yield slice(first, first + at_a_time)


def _grouped_gradients(
    grad: Tensor, x: Tensor, kernels: Tensor, geometry: Geometry, *, needs_x: bool, needs_kernels: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of one conv whose groups are the images."""
    flat = kernels.contiguous().flatten(0, 1)
    walk: Any = geometry
    grad_x, grad_kernels = gradients_of_images(grad, x, flat, *walk, needs_x=needs_x, needs_kernels=needs_kernels)
    return grad_x, None if grad_kernels is None else grad_kernels.view(kernels.shape)


def _unfolded_gradients(
    grad: Tensor, x: Tensor, kernels: Tensor, geometry: Geometry, *, needs_x: bool, needs_kernels: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of one batched matmul with the unfolded input."""
    with torch.enable_grad():  # for the unfolding alone, whose gradient is to add up what each tap met
        leaf = x.detach().requires_grad_(needs_x)
        rows, _ = strategies.unfolded(leaf, kernels.shape[3:], geometry)  # [n, groups, C_in / groups * taps, L]
    flat = grad.flatten(2).unflatten(1, (geometry.groups, -1))  # [n, groups, C_out / groups, L]
    matrix = kernels.flatten(2).unflatten(1, (geometry.groups, -1))  # [n, groups, C_out / groups, C_in / groups * taps]
    grad_kernels = (flat @ rows.detach().transpose(2, 3)).view(kernels.shape) if needs_kernels else None
    if not needs_x:
        return None, grad_kernels
    (grad_x,) = torch.autograd.grad(rows, leaf, matrix.transpose(2, 3) @ flat)
    return grad_x, grad_kernels


def _bank_gradient(grad_kernels: Tensor, eta: Tensor) -> Tensor:
    """`sum_n eta[n, i, t] * grad_kernels[n, t]`, `[g * C_out, K]`."""
    images, channels = grad_kernels.shape[:2]
    if eta.shape[2] == 1:
        return (eta.flatten(1).t() @ grad_kernels.view(images, -1)).view(-1, grad_kernels[0, 0].numel())
    return torch.einsum("ngt,ntk->gtk", eta, grad_kernels.view(images, channels, -1)).flatten(0, 1)


def _coefficient_gradient(bank: Tensor, grad_kernels: Tensor, per_channel: bool) -> Tensor:
    """`<w[i, t], grad_kernels[n, t]>`: `[n, g, C_out]`, or summed over t `[n, g, 1]`."""
    if not per_channel:
        return (grad_kernels.flatten(1) @ bank.flatten(1).t()).unsqueeze(2)
    return torch.einsum("gtk,ntk->ngt", bank.flatten(2), grad_kernels.flatten(2))
