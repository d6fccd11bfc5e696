"""Tiles: dynamic conv on a CPU, a few images and output channels at a time.

The kernels of a whole batch don't fit a cache, and memory that is fresh from the system costs more to touch
than a kernel costs to mix. So a tile's kernels are mixed into one buffer, used while they are in cache, and
overwritten by the next tile's. The backward mixes them again instead of keeping them, and reduces the
kernels' gradients to the bank's and the coefficients' tile by tile.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dyconvert.nn.mixing import bank_gradient, by_factors, coefficient_gradient, factor_gradient, fast_kernels_of, mix
from dyconvert.nn.mixture import Mixing
from dyconvert.nn.operands import Geometry, Gradients, Needs, Operands
from dyconvert.nn.strategies import CONV
from dyconvert.torch_internals.operators import gradients_of_images, unsafe_view

# Buffers up to this size are reused by the C library's allocator, also with the conv's own copy and a backward's
# gradient beside them; fresh memory from the system costs more to touch than a kernel costs to mix. Beyond it the
# work is split into tiles.
_REUSED = 12 * 2**20
# Bytes of a tile's kernels that stay in a core's share of the outer caches. Half and twice as many measure the same.
_BYTES = 4 * 2**20
# Bytes of a tile's input, which a conv copies into an order of its own, as it does its output.
_ACTIVATIONS = 16 * 2**20
# Images that one grouped conv takes: with more it falls behind.
_GROUPS = 32
# Fewer images (where their maps are large; where their kernels are) or channels at a time, and calls cost more than
# the cache saves.
_IMAGES_OF_MAPS = 4
_IMAGES_OF_KERNELS = 8
_CHANNELS = 64


_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Tile(NamedTuple):
    """How many images and output channels are convolved at a time."""

    images: int
    channels: int


def _even(images: int, most: int) -> int:
    """About `most` images a tile, in tiles of one size."""
    tiles = -(-images // min(most, images))
    return -(-images // tiles)


def _walk(tile: Tile, images: int, channels: int) -> Iterator[tuple[slice, slice]]:
    """The tiles, as `(channels, images)`; channels outermost, so that the bank is read once."""
    for first in range(0, channels, tile.channels):
        for image in range(0, images, tile.images):
            yield slice(first, first + tile.channels), slice(image, image + tile.images)


class _Shapes:
    """A dynamic conv's sizes, and its bank as `[g, C_out, K]`, in the order in which it lies in memory."""

    def __init__(self, operands: Operands, tile: Tile | None) -> None:
        x, weight, _, mixing, geometry, _ = operands
        g = mixing.g
        self.images = x.shape[0]
        self.dtype = x.dtype
        self.channels = weight.shape[0] // g
        self.kernel = weight.shape[1:]
        self.last = is_channels_last(weight)
        self.bank = self.flat(weight).view(g, self.channels, -1)
        self.elements = self.bank.shape[2]
        self.groups = geometry.groups
        self.pointwise = self.groups == 1 and self.elements == x.shape[1] and not any(geometry.padding)
        self.tile = tile or self._choose_tile(x)

    def _choose_tile(self, x: Tensor) -> Tile:
        size = x.element_size()
        images = self.images
        if not self.pointwise:
            most = max(_ACTIVATIONS * images // (x.numel() * size), _IMAGES_OF_MAPS)
            images = _even(images, min(_GROUPS, most))
        kernel = self.channels * self.elements * size
        if images * kernel <= _BYTES or (
            self.images <= _GROUPS and images == self.images and images * kernel <= _REUSED
        ):
            return Tile(images, self.channels)
        images = _even(images, max(_BYTES // kernel, _IMAGES_OF_KERNELS))
        if images * kernel <= _BYTES or self.groups > 1:
            return Tile(images, self.channels)
        blocks = max(_BYTES // (images * self.elements * size) // _CHANNELS, 1)
        return Tile(images, min(blocks * _CHANNELS, self.channels))

    def flat(self, kernels: Tensor) -> Tensor:
        """Kernels `[rows, C_in / groups, *kernel]` as `[rows, K]`, contiguous, in the bank's order."""
        return (kernels.movedim(1, -1) if self.last else kernels).reshape(kernels.shape[0], -1).contiguous()

    def unflat(self, kernels: Tensor) -> Tensor:
        """The inverse of `flat`, from `[..., K]`."""
        if not self.last:
            return kernels.view(-1, *self.kernel)
        return kernels.view(-1, *self.kernel[1:], self.kernel[0]).movedim(-1, 1)

    def in_order(self, mixing: Mixing) -> Mixing:
        """The mixing with factors `[N, groups, K]`, in the order of the bank's elements in memory."""
        factors = mixing.factors
        if factors is None:
            return mixing
        return mixing._replace(factors=(factors.movedim(2, -1) if self.last else factors).flatten(2))

    def unflat_factors(self, factors: Tensor) -> Tensor:
        """`[N, groups, K]` in the bank's order as `[N, groups, C_in / groups, *kernel]`."""
        if not self.last:
            return factors.unflatten(2, tuple(self.kernel))
        return factors.unflatten(2, (*self.kernel[1:], self.kernel[0])).movedim(-1, 2)

    def buffer(self) -> Tensor:
        rows = min(self.tile.images, self.images) * min(self.tile.channels, self.channels)
        return self.bank.new_empty(rows * self.elements, dtype=self.dtype)

    def rows(self, buffer: Tensor, images: int, channels: int) -> Tensor:
        """The part of the buffer that a tile's kernels take: `[images, channels, K]`."""
        return buffer[: images * channels * self.elements].view(images, channels, self.elements)


def _at_stride(x: Tensor, geometry: Geometry) -> Tensor:
    """The pixels of its input that a 1 x 1 conv reads."""
    if all(step == 1 for step in geometry.stride):
        return x
    return x[(slice(None), slice(None), *(slice(None, None, step) for step in geometry.stride))]


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` lies in memory with its channels last, and not otherwise as well."""
    return x.dim() in _FORMATS and not x.is_contiguous() and x.is_contiguous(memory_format=_FORMATS[x.dim()])


def forward(operands: Operands, tile: Tile | None = None) -> Tensor:
    """A dynamic conv without autograd."""
    x, weight, bias, mixing, geometry, shift = operands
    biases = _biases(bias, mixing.coefficients, shift)
    if tile is None and weight.is_contiguous():
        if x.shape[0] == 1:
            return _one(operands, biases)
        if _fits(operands):
            return _at_once(operands, biases)
    shapes = _Shapes(operands, tile)
    mixing = shapes.in_order(mixing)
    if shapes.pointwise:
        out = _pointwise_forward(_at_stride(x, geometry), shapes, mixing)
        return out if biases is None else out.add_(biases.view(*biases.shape, *[1] * (x.dim() - 2)))
    convolve = _each if is_channels_last(x) or shapes.images == 1 else _together
    buffer = shapes.buffer()
    out = None
    for channels, images in _walk(shapes.tile, shapes.images, shapes.channels):
        bank = shapes.bank[:, channels]
        part = mixing.part(images, channels)
        kernels = fast_kernels_of(bank, part, shapes.rows(buffer, part.images, bank.shape[1]))
        maps = convolve(x[images], kernels, None if biases is None else biases[images, channels], shapes, geometry)
        if maps.shape[0] == shapes.images and maps.shape[1] == shapes.channels:
            return maps
        if out is None:
            out = _empty_like(x, (shapes.images, shapes.channels, *maps.shape[2:]))
        out[images, channels] = maps
    return out


def _biases(bias: Tensor | None, coefficients: Tensor, shift: Tensor | None) -> Tensor | None:
    """The biases and shifts of each image's output channels, `[N, C_out]`."""
    if bias is None:
        return None if shift is None else shift.expand(coefficients.shape[0], -1)
    biases = mix(bias.to(coefficients.dtype).unflatten(0, (coefficients.shape[1], -1)), coefficients)
    return biases if shift is None else biases + shift


def _empty_like(x: Tensor, size: tuple[int, ...]) -> Tensor:
    form = _FORMATS[x.dim()] if is_channels_last(x) else torch.contiguous_format
    return torch.empty(size, dtype=x.dtype, memory_format=form)


def _fits(operands: Operands) -> bool:
    """Whether nothing that one conv for the whole batch needs is too large for one tile."""
    x, weight, _, mixing, geometry, _ = operands
    batch, g = mixing.images, mixing.g
    size = x.element_size()
    kernels = weight.numel() // g * batch * size
    if weight.shape[2:].numel() == 1 and geometry.groups == 1:
        return kernels <= 2 * _BYTES
    return batch <= _GROUPS and kernels <= _REUSED and x.numel() * size <= _ACTIVATIONS and not is_channels_last(x)


def _one(operands: Operands, biases: Tensor | None) -> Tensor:
    """One image: the plain conv. At this size every call counts."""
    x, weight, _, mixing, geometry, _ = operands
    size = weight.shape
    kernel = fast_kernels_of(weight.view(mixing.g, size[0] // mixing.g, -1), _flat(mixing)).view(-1, *size[1:])
    return CONV[len(size) - 2](x, kernel, None if biases is None else biases.flatten(), *geometry)


def _flat(mixing: Mixing) -> Mixing:
    """The mixing with factors `[N, groups, K]`, for a contiguous bank."""
    return mixing if mixing.factors is None else mixing._replace(factors=mixing.factors.flatten(2))


def _at_once(operands: Operands, biases: Tensor | None) -> Tensor:
    """One tile for everything."""
    x, weight, _, mixing, geometry, _ = operands
    batch, g = mixing.images, mixing.g
    size = weight.shape
    rows = size[0] // g
    bank = weight.view(g, rows, -1)
    kernels = fast_kernels_of(bank, _flat(mixing))
    if geometry.groups == 1 and bank.shape[2] == x.shape[1] and not any(geometry.padding):
        source = _at_stride(x, geometry)
        out = _empty_like(source, (batch, rows, *source.shape[2:]))
        torch.bmm(kernels, source.flatten(2), out=out.flatten(2))
        return out if biases is None else out.add_(biases.view(batch, rows, *[1] * (x.dim() - 2)))
    out = CONV[len(size) - 2](
        x.reshape(1, -1, *x.shape[2:]),
        kernels.view(-1, *size[1:]),
        None if biases is None else biases.flatten(),
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups * batch,
    )
    return unsafe_view(out, (batch, rows, *out.shape[2:]))


def _together(x: Tensor, kernels: Tensor, biases: Tensor | None, shapes: _Shapes, geometry: Geometry) -> Tensor:
    """One conv, the images being its groups."""
    images = x.shape[0]
    out = CONV[x.dim() - 2](
        x.reshape(1, -1, *x.shape[2:]),
        shapes.unflat(kernels),
        None if biases is None else biases.flatten(),
        *geometry._replace(groups=geometry.groups * images),
    )
    return unsafe_view(out, (images, kernels.shape[1], *out.shape[2:]))


def _each(x: Tensor, kernels: Tensor, biases: Tensor | None, shapes: _Shapes, geometry: Geometry) -> Tensor:
    """A conv per image: what keeps channels last without moving them."""
    convolve = CONV[x.dim() - 2]
    parts = [
        convolve(x[n : n + 1], shapes.unflat(kernels[n]), None if biases is None else biases[n], *geometry)
        for n in range(x.shape[0])
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pointwise_forward(x: Tensor, shapes: _Shapes, mixing: Mixing) -> Tensor:
    """1 x 1 convs as matmuls `[C_out, C_in] @ [C_in, L]`."""
    out = _empty_like(x, (shapes.images, shapes.channels, *x.shape[2:]))
    pixels, results = x.flatten(2), out.flatten(2)
    buffer = shapes.buffer()
    for channels, images in _walk(shapes.tile, shapes.images, shapes.channels):
        bank = shapes.bank[:, channels]
        part = mixing.part(images, channels)
        kernels = fast_kernels_of(bank, part, shapes.rows(buffer, part.images, bank.shape[1]))
        torch.bmm(kernels, pixels[images], out=results[images, channels])
    return out


def backward(grad: Tensor, operands: Operands, needs: Needs, tile: Tile | None = None) -> Gradients:
    """Those gradients that are needed; without autograd."""
    x, _, _, mixing, geometry, _ = operands
    coefficients = mixing.coefficients
    shapes = _Shapes(operands, tile)
    mixing = shapes.in_order(mixing)
    gradients = _pointwise_gradients if shapes.pointwise else _conv_gradients
    per_channel = mixing.per_channel
    source = _at_stride(x, geometry) if shapes.pointwise else x
    blocks = -(-shapes.channels // shapes.tile.channels)
    grad_source = None
    grad_bank = grad_eta = None
    grad_factors = torch.zeros_like(mixing.factors) if needs.factors else None
    buffer = shapes.buffer() if needs.x else None
    for channels, images in _walk(shapes.tile, shapes.images, shapes.channels):
        bank = shapes.bank[:, channels]
        at = (images, slice(None), channels) if per_channel else (images,)
        part = mixing.part(images, channels)
        eta, factors = part
        kernels = fast_kernels_of(bank, part, shapes.rows(buffer, part.images, bank.shape[1])) if needs.x else None
        grad_x, grad_kernels = gradients(
            grad[images, channels], source[images], kernels, shapes, geometry, needs.kernels
        )
        if needs.factors:
            plain = fast_kernels_of(bank, Mixing(eta))
            grad_factors[images] += factor_gradient(plain, grad_kernels, factors.shape[1])
        if factors is not None and grad_kernels is not None:
            grad_kernels = by_factors(grad_kernels, factors)
        if needs.weight:
            if grad_bank is None:
                grad_bank = torch.empty_like(shapes.bank)
            bank_gradient(grad_bank[:, channels], grad_kernels, eta, add=images.start > 0)
        if needs.coefficients:
            part_eta = coefficient_gradient(bank, grad_kernels, per_channel)
            if grad_eta is None:
                grad_eta = part_eta if part_eta.shape == coefficients.shape else torch.zeros_like(coefficients)
            if grad_eta is not part_eta:
                grad_eta[at] += part_eta
        if needs.x:
            if grad_x.shape[0] == shapes.images and blocks == 1:
                grad_source = grad_x
            else:
                if grad_source is None:
                    grad_source = torch.zeros_like(source) if blocks > 1 else torch.empty_like(source)
                if channels.start == 0:
                    grad_source[images] = grad_x
                else:
                    grad_source[images] += grad_x
    if needs.x and source is not x:
        grad_full = torch.zeros_like(x)
        _at_stride(grad_full, geometry).copy_(grad_source)
        grad_source = grad_full
    grad_bank = None if grad_bank is None else shapes.unflat(grad_bank)
    grad_factors = None if grad_factors is None else shapes.unflat_factors(grad_factors)
    return Gradients(grad_source, grad_bank, grad_eta, grad_factors)


def _pointwise_gradients(
    grad: Tensor, x: Tensor, kernels: Tensor | None, shapes: _Shapes, geometry: Geometry, needs_kernels: bool
) -> tuple[Tensor | None, Tensor | None]:
    flat = grad.flatten(2)  # [N, C_out, L]
    grad_x = None if kernels is None else torch.bmm(kernels.transpose(1, 2), flat).view(x.shape)
    return grad_x, torch.bmm(flat, x.flatten(2).transpose(1, 2)) if needs_kernels else None


def _conv_gradients(
    grad: Tensor, x: Tensor, kernels: Tensor | None, shapes: _Shapes, geometry: Geometry, needs_kernels: bool
) -> tuple[Tensor | None, Tensor | None]:
    images, channels = grad.shape[:2]
    needs_x = kernels is not None
    own = shapes.unflat(kernels) if needs_x else grad.new_empty(1).expand(images * channels, *shapes.kernel)
    walk: Any = geometry
    grad_x, grad_kernels = gradients_of_images(grad, x, own, *walk, needs_x=needs_x, needs_kernels=needs_kernels)
    return grad_x, None if grad_kernels is None else shapes.flat(grad_kernels).view(images, channels, -1)
