"""The compiled kernels of `csrc/`: where they are, what they can do, and calling them.

They are plain C functions in a library that is built when dyconvert is installed, if there is a C++ compiler. They
link against nothing of torch's: memory is handed over by address, and torch's own threads through the function
`torch_parallel_for` of its stable C interface, so that one build serves every torch that has it (2.10 on).
"""

import ctypes
import functools
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dyconvert.nn.strategies import Geometry

_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # as `csrc/native.cpp` numbers them
# What is computed in, and the banks that are read with it.
BANKS = {
    torch.float32: (torch.float32, torch.float16, torch.bfloat16),
    torch.float64: (torch.float64,),
}
# Tensors with memory of their own, unlike what a subclass may be.
_PLAIN = (Tensor, nn.Parameter)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None: not built, not for this processor or torch, or switched off by
    `DYCONVERT_NATIVE=0` in the environment."""
    path = Path(__file__).with_name("_native.so")
    if os.environ.get("DYCONVERT_NATIVE") == "0" or not path.exists() or _parallel_for() is None:
        return None
    if platform.machine().lower() in ("x86_64", "amd64") and "AVX" not in torch.backends.cpu.get_cpu_capability():
        return None  # it is compiled for AVX2
    try:
        found = ctypes.CDLL(str(path))
    except OSError:
        return None
    for function, tensors, types in (
        (found.dyconvert_conv, 6, 2),
        (found.dyconvert_input_gradient, 4, 1),
        (found.dyconvert_bank_gradient, 6, 1),
    ):  # the shape, torch's threads, the tensors' addresses and their types; declared, calls are quicker
        function.argtypes = [ctypes.c_void_p] * (2 + tensors) + [ctypes.c_int] * types
    return found


@functools.cache
def _parallel_for() -> int | None:
    folder = Path(torch.__file__).parent / "lib"
    for path in (*folder.glob("libtorch_cpu.so"), *folder.glob("libtorch_cpu.dylib")):
        function = getattr(ctypes.CDLL(str(path)), "torch_parallel_for", None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p).value
    return None


class Call(NamedTuple):
    """How the compiled kernels are asked for a dynamic conv."""

    shape: ctypes.Array  # the `Shape` of `csrc/problem.h`
    size: tuple[int, ...]  # the output's
    channels_last: bool  # the output's memory format
    differentiable: bool  # whether :func:`backward` knows it


def prepare(x: Tensor, weight: Tensor, bias: Tensor | None, coefficients: Tensor, geometry: Geometry) -> Call | None:
    """How :func:`forward` is to compute a dynamic conv; None if it can't.

    Arguments are those of a strategy, padding as numbers.
    """
    last = not weight.is_contiguous()
    if (
        library() is None
        or x.dim() != 4
        or not x.is_cpu
        or weight.dtype not in BANKS.get(x.dtype, ())
        or coefficients.dtype != x.dtype
        or (bias is not None and (bias.dtype != weight.dtype or not bias.is_contiguous()))
        or (last and not weight.is_contiguous(memory_format=torch.channels_last))
        or not all(type(t) in _PLAIN for t in (x, weight, coefficients))
    ):
        return None
    return _call(
        x.shape,
        x.stride(),
        weight.shape,
        last,
        coefficients.shape,
        coefficients.stride(),
        tuple(geometry.stride),
        tuple(geometry.padding),
        tuple(geometry.dilation),
        geometry.groups,
        torch.get_num_threads(),
    )


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficients: Tensor,
    geometry: Geometry,
    call: Call,
    shift: Tensor | None = None,
) -> Tensor:
    """A dynamic conv without autograd, with what :func:`prepare` found for these arguments."""
    if call.channels_last:
        out = torch.empty(call.size, dtype=x.dtype, memory_format=torch.channels_last)
    else:
        out = x.new_empty(call.size)
    if shift is not None:
        shift = shift.to(x.dtype)
    failed = library().dyconvert_conv(
        call.shape,
        _parallel_for(),
        x.data_ptr(),
        weight.data_ptr(),
        coefficients.data_ptr(),
        _address(bias),
        _address(shift),
        out.data_ptr(),
        _TYPES[x.dtype],
        _TYPES[weight.dtype],
    )
    _check(failed, call)
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    geometry: Geometry,
    needs: tuple[bool, bool, bool],
    call: Call,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `x`, `weight` and `coefficients`, those that are needed, where the call is differentiable."""
    needs_x, needs_bank, needs_eta = needs
    grad = grad.contiguous()
    dtype = _TYPES[x.dtype]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
    bank, eta = weight.data_ptr(), coefficients.data_ptr()
    if needs_x:
        failed = library().dyconvert_input_gradient(
            call.shape, _parallel_for(), grad.data_ptr(), bank, eta, grad_x.data_ptr(), dtype
        )
        _check(failed, call)
    grad_bank = torch.empty_like(weight) if needs_bank else None
    grad_eta = torch.empty_like(coefficients, memory_format=torch.contiguous_format) if needs_eta else None
    if needs_bank or needs_eta:
        failed = library().dyconvert_bank_gradient(
            call.shape,
            _parallel_for(),
            grad.data_ptr(),
            x.data_ptr(),
            bank,
            eta,
            _address(grad_bank),
            _address(grad_eta),
            dtype,
        )
        _check(failed, call)
    return grad_x, grad_bank, grad_eta


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(failed: int, call: Call) -> None:
    if failed:
        raise MemoryError(f"There is no memory for a dynamic conv of {call.size[0]} images. Take a smaller batch.")


def size_of_output(size: Sequence[int], kernel_size: Sequence[int], geometry: Geometry) -> list[int]:
    """The height and width of a conv's output, padding as numbers."""
    return [
        (length + 2 * pad - step * (kernel - 1) - 1) // jump + 1
        for length, kernel, jump, pad, step in zip(size, kernel_size, *geometry[:3], strict=True)
    ]


def writes_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the output of an input that lies so has its channels last."""
    return strides[1] == 1 and shape[1] > 1 and strides[3] > 1


@functools.lru_cache(maxsize=1024)
def _call(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    bank: tuple[int, ...],
    bank_last: bool,
    coefficients: tuple[int, ...],
    coefficient_strides: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    threads: int,
) -> Call | None:
    images, in_channels, *size = shape
    g = coefficients[1]
    channels = bank[0] // g
    out = size_of_output(size, bank[2:], Geometry(stride, padding, dilation, groups))
    sizes = (in_channels, *size, images)
    if min(*out, *sizes) < 1 or min(padding) < 0 or in_channels != bank[1] * groups or channels % groups:
        return None  # torch says best what doesn't fit
    if (
        in_channels
        * math.prod(length + 2 * max(pad, jump) for length, pad, jump in zip(size, padding, stride, strict=True))
        >= 2**31
    ):
        return None  # `csrc` counts an image's elements in 32 bits
    last = writes_channels_last(shape, strides)
    fields = [
        *(images, in_channels, *size, channels, *out, g, groups, *bank[2:]),
        *(*stride, *padding, *dilation, *strides),
        *((1, channels) if last else (out[0] * out[1], 1)),
        bank_last,
        *coefficient_strides[:2],
        coefficient_strides[2] if coefficients[2] > 1 else 0,
        threads,
    ]
    return Call(
        (ctypes.c_int64 * len(fields))(*fields), (images, channels, *out), last, not last and not bank_last and g <= 64
    )
