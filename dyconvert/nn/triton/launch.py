"""Launches the Triton kernels for a dynamic conv and its gradients.

Kernels are mixed first, into one buffer for as many images as fit into it, or in the conv itself if the tile says so;
`docs/kernels.md` has the arithmetic that tells which is faster where. Backward mixes the kernels again for the input's
gradient. The gradients of bank and coefficients are reduced while the gradient of an image's kernel is in registers.
"""

import math
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dyconvert.nn.mixing import mix
from dyconvert.nn.native import size_of_output
from dyconvert.nn.operands import Geometry, Gradients, Needs, Operands
from dyconvert.nn.triton.tile import Tile

# At most this many bytes of kernels are mixed at a time: of the whole batch, or of some of its images.
_BYTES = 512 * 2**20
# Programs that keep the largest GPUs busy: four on each of 132 multiprocessors.
_PROGRAMS = 512
# Elements that a program of the mixing kernel, or of a depthwise conv, computes.
_BLOCK = 512


def _kernels() -> ModuleType:
    from dyconvert.nn.triton import kernels

    return kernels


def _gradient_kernels() -> ModuleType:
    from dyconvert.nn.triton import gradient_kernels

    return gradient_kernels


def _on(x: Tensor) -> Any:
    """Makes the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _precision(x: Tensor) -> str:
    """The precision in which float32 is multiplied: the one that the user allows cuDNN."""
    backends: Any = torch.backends
    return "tf32" if x.dtype == torch.float32 and backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def _is_depthwise(weight: Tensor, g: int, groups: int) -> bool:
    return weight.shape[1] == 1 and weight.shape[0] == g * groups and groups > 1


def _eta_strides(coefficients: Tensor) -> tuple[int, int, int]:
    n, expert, row = coefficients.stride()
    return n, expert, row if coefficients.shape[2] > 1 else 0


def forward(operands: Operands, tile: Tile) -> Tensor:
    """A dynamic conv, without autograd and without factors."""
    x, weight, bias, (coefficients, _), geometry, shift = operands
    channels = weight.shape[0] // coefficients.shape[1]
    size = size_of_output(x.shape[2:], weight.shape[2:], geometry)
    out = _like(x, (x.shape[0], channels, *size))
    biases = _biases(bias, coefficients, shift)
    # A depthwise conv's kernels are so small that mixing them first costs nothing.
    fused = tile.fused and not _is_depthwise(weight, coefficients.shape[1], geometry.groups)
    with _on(x):
        for images in _image_ranges(x, weight, coefficients):
            kernels = None if fused else _mixed(weight, coefficients[images], x.dtype)
            _launch(
                x[images],
                out[images],
                kernels,
                weight,
                coefficients[images],
                geometry,
                tile,
                biases=None if biases is None else biases[images],
                transposed=False,
            )
    return out


def backward(grad: Tensor, operands: Operands, needs: Needs, tile: Tile) -> Gradients:
    """The needed gradients, without autograd and without factors."""
    x, weight, _, (coefficients, _), geometry, _ = operands
    grad_x = torch.empty_like(x) if needs.x else None
    grad_bank = grad_eta = None
    with _on(x):
        if needs.x:
            for images in _image_ranges(x, weight, coefficients):
                kernels = _mixed(weight, coefficients[images], x.dtype)
                _launch(
                    grad[images], grad_x[images], kernels, weight, coefficients[images], geometry, tile, transposed=True
                )
        if needs.kernels:
            grad_bank, grad_eta = _bank_and_coefficients(grad, operands, needs)
    return Gradients(grad_x, grad_bank, grad_eta, None)


def _like(x: Tensor, size: tuple[int, ...]) -> Tensor:
    last = x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=form)


def _biases(bias: Tensor | None, coefficients: Tensor, shift: Tensor | None) -> Tensor | None:
    """The mixed biases and shifts of each image's output channels, `[N, C_out]`, float32, contiguous; None: none."""
    if bias is None:
        return None if shift is None else shift.float().expand(coefficients.shape[0], -1).contiguous()
    biases = mix(bias.float().unflatten(0, (coefficients.shape[1], -1)), coefficients.float())
    return (biases if shift is None else biases + shift.float()).contiguous()


def _image_ranges(x: Tensor, weight: Tensor, coefficients: Tensor) -> list[slice]:
    """Ranges of images, whose kernels are in memory at the same time."""
    kernel = weight.numel() // coefficients.shape[1] * x.element_size()
    images = max(min(_BYTES // max(kernel, 1), x.shape[0]), 1)
    return [slice(first, first + images) for first in range(0, x.shape[0], images)]


def _mixed(weight: Tensor, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """Each image's kernel, taps before input channels: `[N, C_out, kh * kw, C_in / groups]`, contiguous."""
    images, g = coefficients.shape[:2]
    channels = weight.shape[0] // g
    _, per_group, kernel_h, kernel_w = weight.shape
    row, channel, tap_h, tap_w = weight.stride()
    out = torch.empty((images, channels, kernel_h * kernel_w, per_group), dtype=dtype, device=weight.device)
    padded = _power_of_two(g)
    together = min(images, 16)
    block = max(16 * _BLOCK // padded, 64)  # 64 registers of each of 128 threads, and sums within a thread
    grid = (-(-out[0].numel() // block), -(-images // together))
    _kernels().mix[grid](
        weight,
        coefficients,
        out,
        *(images, channels, per_group, kernel_h * kernel_w, kernel_w),
        *(channels * row, row, channel, tap_h, tap_w),
        *_eta_strides(coefficients),
        EXPERTS=g,
        EXPERTS_PADDED=padded,
        PER_CHANNEL=coefficients.shape[2] > 1,
        IMAGES=together,
        BLOCK=block,
    )
    return out


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def _launch(
    source: Tensor,
    out: Tensor,
    kernels: Tensor | None,
    weight: Tensor,
    coefficients: Tensor,
    geometry: Geometry,
    tile: Tile,
    *,
    biases: Tensor | None = None,
    transposed: bool,
) -> None:
    """The conv, or transposed the gradient of its input: from `source` to `out`."""
    images, g = coefficients.shape[:2]
    groups = geometry.groups
    channels = weight.shape[0] // g
    _, per_group, kernel_h, kernel_w = weight.shape
    per_group_out = channels // groups
    rows, contracted = (per_group, per_group_out) if transposed else (per_group_out, per_group)
    height, width = out.shape[2:]
    phases = geometry.stride if transposed else (1, 1)
    phase_size = [-(-length // count) for length, count in zip((height, width), phases, strict=True)]
    # From one tap that reads whole pixels to the next.
    steps = [s // math.gcd(s, d) if transposed else 1 for s, d in zip(geometry.stride, geometry.dilation, strict=True)]
    walk = (
        *source.shape[2:],
        *(height, width),
        *phase_size,
        *(kernel_h, kernel_w),
        *geometry.stride,
        *geometry.padding,
        *geometry.dilation,
        *steps,
    )
    pixels = math.prod(phase_size)
    bias = out if biases is None else biases  # a pointer that isn't read
    if _is_depthwise(weight, g, groups):
        # Neighbouring channels are read together.
        last = out.stride(1) == 1 and channels > 1
        most = min(_power_of_two(pixels), 1024) if not last else 16
        across = max(2 * _BLOCK // most, 1) if not last else min(_power_of_two(channels), 64)
        grid = (-(-channels // across) * -(-pixels // most), images, math.prod(phases))
        _kernels().depthwise[grid](
            kernels,
            source,
            out,
            bias,
            channels,
            *walk,
            *source.stride(),
            *out.stride(),
            TRANSPOSED=transposed,
            BIAS=biases is not None,
            CHANNELS=across,
            PIXELS=most,
        )
        return
    if kernels is None:
        row, channel, tap_h, tap_w = weight.stride()
        strides: tuple[int, ...] = (channels * row, per_group_out * row, row, channel, tap_h, tap_w)
    else:
        row, tap = kernels.stride(1), kernels.stride(2)
        strides = (kernels.stride(0), per_group_out * row, *((1, row) if transposed else (row, 1)))
        strides += (kernel_w * tap, tap)
    sizes = _fitting(tile, rows, pixels, contracted, source.element_size())
    grid = (
        -(-rows // sizes[0]) * -(-pixels // sizes[1]),
        images,
        groups * math.prod(phases),
    )
    _kernels().conv[grid](
        weight if kernels is None else kernels,
        coefficients,
        source,
        out,
        bias,
        rows,
        contracted,
        *walk,
        *strides,
        *source.stride(),
        *out.stride(),
        *_eta_strides(coefficients),
        channels,
        TRANSPOSED=transposed,
        FUSED=kernels is None,
        EXPERTS=g if kernels is None else 1,
        BIAS=biases is not None,
        PRECISION=_precision(source),
        ROWS=sizes[0],
        PIXELS=sizes[1],
        CONTRACTED=sizes[2],
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _fitting(tile: Tile, rows: int, pixels: int, contracted: int, element: int) -> tuple[int, int, int]:
    """The tile's sizes, limited to the size of the problem, but at least 16, which tensor cores need."""
    deep = tile.contracted * (2 if element == 2 else 1)
    limits = ((tile.rows, rows), (tile.pixels, pixels), (deep, contracted))
    down, across, deep = (max(min(size, _power_of_two(count)), 16) for size, count in limits)
    return down, across, deep


def _bank_and_coefficients(grad: Tensor, operands: Operands, needs: Needs) -> tuple[Tensor | None, Tensor | None]:
    x, weight, _, (coefficients, _), geometry, _ = operands
    images, g, per = coefficients.shape
    groups = geometry.groups
    channels = weight.shape[0] // g
    _, per_group, kernel_h, kernel_w = weight.shape
    rows = channels // groups
    taps = kernel_h * kernel_w
    row, channel, tap_h, tap_w = weight.stride()
    padded = _power_of_two(g)
    depthwise = _is_depthwise(weight, g, groups)
    # A program holds 8192 numbers of the bank, and as many of its gradient: 32 registers each of 256 threads.
    if depthwise:
        across = max(min(16, 8192 // padded // _power_of_two(taps)), 1)
        blocks: tuple[int, ...] = (-(-channels // across),)
    else:
        down = max(min(32, _power_of_two(rows)), 16)
        across = max(min(8192 // padded // down, _power_of_two(per_group), 64), 16)
        blocks = (-(-rows // down) * -(-per_group // across) * taps, groups)
    splits = max(min(_PROGRAMS // max(math.prod(blocks), 1), images), 1)
    at_a_time = -(-images // splits)
    splits = -(-images // at_a_time)
    atomic = splits > 1
    grad_bank = torch.zeros_like(weight, dtype=torch.float32) if needs.weight else None
    if grad_bank is not None and grad_bank.stride() != weight.stride():
        grad_bank = torch.empty_strided(weight.shape, weight.stride(), dtype=torch.float32, device=weight.device)
        grad_bank.zero_()
    grad_eta = torch.zeros((images, g, per), dtype=torch.float32, device=x.device) if needs.coefficients else None
    unread = x  # a pointer that isn't followed
    pointers = (
        grad,
        x,
        weight,
        coefficients,
        unread if grad_bank is None else grad_bank,
        unread if grad_eta is None else grad_eta,
    )
    walk = (*x.shape[2:], *grad.shape[2:])
    moves = (*geometry.stride, *geometry.padding, *geometry.dilation)
    places = (g * per, per, at_a_time)
    common = {
        "EXPERTS": g,
        "EXPERTS_PADDED": padded,
        "PER_CHANNEL": per > 1,
        "NEEDS_BANK": needs.weight,
        "NEEDS_ETA": needs.coefficients,
        "ATOMIC": atomic,
    }
    if depthwise:
        _gradient_kernels().depthwise_gradients[(*blocks, splits)](
            *pointers,
            *(images, channels, *walk, kernel_w),
            *moves,
            *grad.stride(),
            *x.stride(),
            *(channels * row, row, tap_h, tap_w),
            *_eta_strides(coefficients),
            *places,
            TAPS=taps,
            TAPS_PADDED=_power_of_two(taps),
            CHANNELS=across,
            PIXELS=min(_power_of_two(grad.shape[2:].numel()), max(2 * _BLOCK // across, 16)),
            **common,
        )
    else:
        _gradient_kernels().gradients[(*blocks, splits)](
            *pointers,
            *(images, rows, per_group, *walk, taps, kernel_w),
            *moves,
            *grad.stride(),
            *x.stride(),
            *(channels * row, row, channel, tap_h, tap_w),
            *_eta_strides(coefficients),
            *places,
            PRECISION=_precision(x),
            ROWS=down,
            CHANNELS=across,
            PIXELS=max(min(64 if x.element_size() == 2 else 32, _power_of_two(grad.shape[2:].numel())), 16),
            num_warps=8,
            **common,
        )
    return (
        None if grad_bank is None else grad_bank.to(weight.dtype),
        None if grad_eta is None else grad_eta.to(coefficients.dtype),
    )
