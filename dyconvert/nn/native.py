"""The engine of the compiled kernels of `csrc/`: which convs they know, and calling them."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dyconvert.errors import ArgumentError
from dyconvert.nn import fitting
from dyconvert.nn.compressed import Compressed
from dyconvert.nn.fitting import Looks
from dyconvert.nn.native_library import Kernel, Shape, Task, library
from dyconvert.nn.operands import Geometry, Gradients, Needs, Operands
from dyconvert.torch_internals.operators import parallel_for

_TYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.int8: 4,
}  # as `csrc/native.cpp` numbers them
_LINEAR_WEIGHTS = (torch.float32, torch.int8, torch.bfloat16)
# For each dtype that the kernels compute in, the dtypes of banks that they read.
BANKS = {
    torch.float32: (torch.float32, torch.float16, torch.bfloat16),
    torch.float64: (torch.float64,),
}
# A compressed bank's differences, by its mean.
COMPRESSED = {torch.float32: (torch.int8, torch.bfloat16)}
# Tensors with memory of their own, unlike what a subclass may be.
_PLAIN = (Tensor, nn.Parameter)


_FAILURES = {
    1: "There is no memory for a dynamic conv of {images} images. Take a smaller batch.",
    2: "A thread of torch's failed in a dynamic conv.",
    3: "A dynamic conv's compiled kernels failed for no reason that they know. DYCONVERT_NATIVE=0 does without them.",
}


class NativeCall(NamedTuple):
    """How the compiled kernels are asked for a dynamic conv."""

    shape: Shape
    size: tuple[int, ...]  # the output's
    channels_last: bool  # the output's memory format
    differentiable: bool  # whether :func:`backward` knows it

    def kernel(self, task: Task, dtype: torch.dtype) -> Kernel:
        """Which of the kernels computes it."""
        return Kernel(library().dyconvert_path(self.shape, task, _TYPES[dtype]))


def prepare(operands: Operands, compressed: Compressed | None = None) -> NativeCall | None:
    """How :func:`forward` is to compute a dynamic conv; None if it can't.

    On the way it is checked that the operands fit together. Answers are kept, so that this costs little beside the
    conv.

    Args:
        operands: of a compressed bank, `weight` are the differences.

    Raises:
        ArgumentError: they don't fit together.
    """
    x, weight, bias, (coefficients, factors), geometry, shift = operands
    if library() is None or not (
        _ordinary(x)
        and _ordinary(weight)
        and _ordinary(coefficients)
        and (bias is None or _ordinary(bias))
        and (shift is None or _ordinary(shift))
        and (factors is None or _ordinary(factors))
    ):
        if compressed is None:
            fitting.check(operands)
        return None
    last = not weight.is_contiguous()
    if compressed is not None and not _readable(compressed, last):
        return None
    call = _call(
        x.shape,
        x.stride(),
        x.dtype,
        weight.shape,
        last,
        weight.dtype,
        coefficients.shape,
        coefficients.stride(),
        coefficients.dtype,
        None if factors is None else (factors.shape, factors.dtype),
        None if bias is None else (bias.shape, bias.stride(), bias.dtype),
        *fitting.numbered(geometry),
        None if shift is None else (shift.shape, shift.stride(), shift.dtype),
        torch.get_num_threads(),
        None if compressed is None else compressed.mean.dtype,
    )
    return None if last and not weight.is_contiguous(memory_format=torch.channels_last) else call


def _readable(bank: Compressed, last: bool) -> bool:
    """Whether what belongs to the differences lies as they do."""
    mean, _, scale = bank
    form = torch.channels_last if last else torch.contiguous_format
    if scale is not None and not (_ordinary(scale) and scale.is_contiguous() and scale.dtype == mean.dtype):
        return False
    return _ordinary(mean) and mean.dim() == 4 and mean.is_contiguous(memory_format=form)


def _ordinary(tensor: Tensor) -> bool:
    """Whether the tensor's elements lie in this computer's memory as its strides say."""
    return type(tensor) in _PLAIN and tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_neg()


def forward(operands: Operands, call: NativeCall, compressed: Compressed | None = None) -> Tensor:
    """A dynamic conv without autograd, with what :func:`prepare` returned for these operands."""
    x, weight, bias, (coefficients, factors), _, shift = operands
    if call.channels_last:
        out = torch.empty(call.size, dtype=x.dtype, device=_CPU, memory_format=torch.channels_last)
    else:
        out = x.new_empty(call.size)
    if shift is not None:
        shift = shift.to(x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    mean, _, scale = (None, None, None) if compressed is None else compressed
    factors = _laid_out(factors, weight)
    failed = library().dyconvert_conv(
        call.shape,
        parallel_for(),
        _address(x),
        _address(weight),
        _address_or_none(mean),
        _address_or_none(scale),
        _address(coefficients),
        _address_or_none(factors),
        _address_or_none(bias),
        _address_or_none(shift),
        _address(out),
        _TYPES[x.dtype],
        _TYPES[weight.dtype],
    )
    _check(failed, call)
    return out


def linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor) -> Tensor | None:
    """A linear layer of weights in float32, int8 or bfloat16, `[outputs, inputs]`, read as they are; None if it can't.

    Args:
        x: `[N, inputs]`, of float32, as are `scale`, `[outputs]` or None, and `bias`, `[outputs]`.
    """
    vectors = [t for t in (x, scale, bias) if t is not None]
    if x.dim() != 2 or weight.dtype not in _LINEAR_WEIGHTS or x.shape[1] != weight.shape[1]:
        return None
    if not (_ordinary(weight) and weight.is_contiguous() and all(map(_ordinary, vectors))):
        return None
    if any(t.dtype is not torch.float32 for t in vectors) or not (x.numel() and weight.numel()):
        return None
    x, bias = x.contiguous(), bias.contiguous()
    images, inputs = x.shape
    out = x.new_empty(images, len(weight))
    failed = library().dyconvert_linear(
        parallel_for(),
        _address(x),
        _address(weight),
        None if scale is None else _address(scale.contiguous()),
        _address(bias),
        _address(out),
        images,
        inputs,
        len(weight),
        _TYPES[weight.dtype],
    )
    if failed:
        raise RuntimeError(_FAILURES[failed].format(images=images))
    return out


def backward(grad: Tensor, operands: Operands, needs: Needs, call: NativeCall) -> Gradients:
    """Those gradients that are needed, where the call is differentiable."""
    # Between forward and backward, a parameter's memory may have been replaced (`weight.data = ...`): asked anew.
    call = prepare(operands)
    if call is None or not call.differentiable or grad.shape != call.size or not _ordinary(grad):
        raise ArgumentError(
            "The arguments of a dynamic conv were replaced by others between forward and backward. Call forward again."
        )
    x, weight, _, (coefficients, factors), *_ = operands
    factors = _laid_out(factors, weight)
    grad = grad.to(x.dtype).contiguous()
    dtype = _TYPES[x.dtype]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs.x else None
    mixed_from = _address(weight), _address(coefficients), _address_or_none(factors)
    if grad_x is not None:
        failed = library().dyconvert_input_gradient(
            call.shape, parallel_for(), _address(grad), *mixed_from, _address(grad_x), dtype
        )
        _check(failed, call)
    grad_bank = torch.empty_like(weight) if needs.weight else None
    grad_eta = torch.empty_like(coefficients, memory_format=torch.contiguous_format) if needs.coefficients else None
    grad_factors = torch.empty_like(factors) if needs.factors else None
    if needs.kernels:
        failed = library().dyconvert_bank_gradient(
            call.shape,
            parallel_for(),
            _address(grad),
            _address(x),
            *mixed_from,
            _address_or_none(grad_bank),
            _address_or_none(grad_eta),
            _address_or_none(grad_factors),
            dtype,
        )
        _check(failed, call)
    return Gradients(grad_x, grad_bank, grad_eta, grad_factors)


def _laid_out(factors: Tensor | None, weight: Tensor) -> Tensor | None:
    """Factors in the order of the bank's elements, contiguous."""
    if factors is None:
        return None
    return factors.contiguous() if weight.is_contiguous() else factors.movedim(2, -1).contiguous()


def _address_or_none(tensor: Tensor | None) -> int | None:
    return None if tensor is None else _address(tensor)


def _address(tensor: Tensor) -> int:
    address = tensor.data_ptr()
    if not address:
        raise ArgumentError(
            "A tensor of a dynamic conv has no memory: it was freed. FSDP does so with parameters that are used "
            "outside of the forward of the module that it wraps."
        )
    return address


def _check(failed: int, call: NativeCall) -> None:
    if failed:
        kind = MemoryError if failed == 1 else RuntimeError
        raise kind(_FAILURES[failed].format(images=call.size[0]))


def size_of_output(size: Sequence[int], kernel_size: Sequence[int], geometry: Geometry) -> list[int]:
    """The height and width of a conv's output, padding as numbers."""
    return [
        (length + 2 * pad - step * (kernel - 1) - 1) // jump + 1
        for length, kernel, jump, pad, step in zip(
            size, kernel_size, geometry.stride, cast(Sequence[int], geometry.padding), geometry.dilation, strict=True
        )
    ]


def writes_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the output of an input that lies so has its channels last."""
    return strides[1] == 1 and shape[1] > 1 and strides[3] > 1


_CPU = torch.device("cpu")
_Vector = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # a tensor's shape, strides and type


@functools.lru_cache(maxsize=1024)
def _call(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    bank: tuple[int, ...],
    bank_last: bool,
    bank_dtype: torch.dtype,
    coefficients: tuple[int, ...],
    coefficient_strides: tuple[int, ...],
    coefficient_dtype: torch.dtype,
    factors: tuple[tuple[int, ...], torch.dtype] | None,
    bias: _Vector | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    shift: _Vector | None,
    threads: int,
    mean_dtype: torch.dtype | None,
) -> NativeCall | None:
    geometry = Geometry(stride, padding, dilation, groups)
    looks = (
        Looks(shape, dtype, _CPU),
        Looks(bank, mean_dtype or bank_dtype, _CPU),
        bias and Looks(bias[0], bias[2], _CPU),
        Looks(coefficients, coefficient_dtype, _CPU),
        factors and Looks(*factors, _CPU),
    )
    fitting.check_looks(*looks, geometry, shift and Looks(shift[0], shift[2], _CPU))
    vectors = (bias is None or bias[1] == (1,)) and (shift is None or shift[1] == (1,))
    banks = BANKS.get(dtype, ()) if mean_dtype is None else COMPRESSED.get(mean_dtype, ())
    if len(shape) != 4 or bank_dtype not in banks or not vectors:
        return None
    images, in_channels, *size = shape
    g = coefficients[1]
    channels = bank[0] // g
    out = size_of_output(size, bank[2:], geometry)
    if min(*out, in_channels, *size, images, channels) < 1:
        return None  # empty
    laid_out = in_channels * math.prod(
        length + 2 * max(pad, jump) for length, pad, jump in zip(size, padding, stride, strict=True)
    )
    span = sum((length - 1) * step for length, step in zip(shape[1:], strides[1:], strict=True))
    if max(laid_out, span, math.prod(bank[1:])) >= 2**31:
        return None  # `csrc` counts the elements of an image, and of a kernel, in 32 bits
    last = writes_channels_last(shape, strides)
    fields = [
        *(images, in_channels, *size, channels, *out, g, groups, *bank[2:]),
        *(*stride, *padding, *dilation, *strides),
        *((1, channels) if last else (out[0] * out[1], 1)),
        bank_last,
        *coefficient_strides[:2],
        coefficient_strides[2] if coefficients[2] > 1 else 0,
        0 if factors is None else factors[0][1],
        threads,
    ]
    size_of_out = (images, channels, *out)
    return NativeCall(Shape(*fields), size_of_out, last, not last and not bank_last and g <= 64)
