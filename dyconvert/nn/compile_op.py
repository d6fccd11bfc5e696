"""The engines as an operator of torch's, which `torch.compile` calls as it is.

A compiler that is shown a dynamic conv operation by operation makes matmuls of the unfolded input of it, at twice
the time. Exported programs keep the plain operations: they are to run without dyconvert.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dyconvert.errors import ArgumentError
from dyconvert.nn import engines, fitting, native, native_library
from dyconvert.nn.compressed import Compressed, plain_linear
from dyconvert.nn.mixture import Mixing
from dyconvert.nn.operands import Geometry, Needs, Operands
from dyconvert.torch_internals.compiling import constant_result

# As the fields of Operands stand, flat: operators take no tuples.
_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
_MIXING = "Tensor coefficients, Tensor? factors"
_library = torch.library.Library("dyconvert", "DEF")
_library.define(
    f"dynamic_conv(Tensor x, Tensor weight, Tensor? bias, {_MIXING}, {_GEOMETRY}, Tensor? shift, bool training)"
    " -> Tensor"
)
_library.define(
    f"dynamic_conv_backward(Tensor grad, Tensor x, Tensor weight, {_MIXING}, {_GEOMETRY}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"compressed_conv(Tensor x, Tensor mean, Tensor differences, Tensor? scale, Tensor? bias, {_MIXING}, {_GEOMETRY},"
    " Tensor? shift) -> Tensor"
)
_library.define("compressed_linear(Tensor x, Tensor weight, Tensor? scale, Tensor bias) -> Tensor")


def _flat(operands: Operands) -> tuple[Any, ...]:
    """The fields behind the weight, as the operators take them."""
    _, _, bias, mixing, (stride, padding, dilation, groups), shift = operands
    return bias, *mixing, list(stride), list(padding), list(dilation), groups, shift


def _operands(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficients: Tensor,
    factors: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    shift: Tensor | None = None,
) -> Operands:
    """The arguments of an operator's call."""
    return Operands(x, weight, bias, Mixing(coefficients, factors), Geometry(stride, padding, dilation, groups), shift)


def takes(x: Tensor, weight: Tensor, training: bool) -> bool:
    """Whether the operator is for this conv, asked while compiling.

    Args:
        training: whether a backward may follow.
    """
    if x.dim() != 4:
        return False
    single = isinstance(x.shape[0], int) and x.shape[0] == 1
    pointwise = weight.shape[2:].numel() == 1
    if x.is_cuda:
        # A single image is a plain conv, and 1 x 1 convs are matmuls, which the compiler joins with what follows; but
        # it would keep their kernels for backward, and unfold the input of others.
        return not single and (training or not pointwise)
    if not x.is_cpu or weight.dtype not in native.BANKS.get(x.dtype, ()) or not built():
        return False
    # A single image with its channels last is a matmul for a 1 x 1 conv, which torch has; the compiled kernels would
    # turn it round.
    return not (single and pointwise and native.writes_channels_last(x.shape, x.stride()))


def dynamic_conv(operands: Operands, *, training: bool = False) -> Tensor:
    """A strategy, padding in numbers. Differentiable but for the bias and the shift.

    Args:
        training: whether a backward may follow. Measurements are looked up by it.
    """
    return torch.ops.dyconvert.dynamic_conv(operands.x, operands.weight, *_flat(operands), training)


@constant_result
def built() -> bool:
    return native_library.library() is not None


def _format(x: Tensor) -> torch.memory_format:
    """The output's: as the compiled kernels have it."""
    return torch.channels_last if native.writes_channels_last(x.shape, x.stride()) else torch.contiguous_format


@torch.library.impl(_library, "dynamic_conv", "CPU")
@torch.library.impl(_library, "dynamic_conv", "CUDA")
def _forward(*flat: Any) -> Tensor:
    *fields, training = flat
    operands = _operands(*fields)
    engine, how = engines.known_or_by_rule(operands, backward=False, training=training)
    return engine.forward(operands, how).contiguous(memory_format=_format(operands.x))


@torch.library.register_fake("dyconvert::dynamic_conv", lib=_library)  # type: ignore[untyped-decorator]
def _(*flat: Any) -> Tensor:
    operands = _operands(*flat[:-1])
    fitting.check(operands)
    x = operands.x
    return x.new_empty(_size_of_output(operands)).contiguous(memory_format=_format(x))


def _size_of_output(operands: Operands) -> list[int]:
    x, weight, _, mixing, geometry, _ = operands
    spatial = native.size_of_output(x.shape[2:], weight.shape[2:], geometry)
    return [x.shape[0], weight.shape[0] // mixing.g, *spatial]


@torch.library.impl(_library, "dynamic_conv_backward", "CPU")
@torch.library.impl(_library, "dynamic_conv_backward", "CUDA")
def _backward(grad: Tensor, x: Tensor, weight: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    *fields, needs = flat
    operands = _operands(x, weight, None, *fields)
    engine, how = engines.known_or_by_rule(operands, backward=True, training=True)
    if list(grad.shape) != _size_of_output(operands) or grad.dtype != x.dtype:
        raise ArgumentError(
            f"The output's gradient has the shape {list(grad.shape)} and type {grad.dtype}. They must be the output's."
        )
    gradients = engine.backward(grad, operands, Needs(*needs), how)
    return tuple(x.new_empty(0) if gradient is None else gradient.contiguous() for gradient in gradients)


@torch.library.register_fake("dyconvert::dynamic_conv_backward", lib=_library)  # type: ignore[untyped-decorator]
def _(grad: Tensor, x: Tensor, weight: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    *fields, needs = flat
    operands = _operands(x, weight, None, *fields)
    fitting.check(operands)
    inputs = zip((x, weight, *operands.mixing), needs, strict=True)
    return tuple(like.new_empty(like.shape) if needed else x.new_empty(0) for like, needed in inputs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    operands = _operands(*inputs[:-1])
    ctx.save_for_backward(operands.x, operands.weight, *operands.mixing)
    ctx.geometry = operands.geometry


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[index] for index in (0, 1, 3, 4)]
    gradients = torch.ops.dyconvert.dynamic_conv_backward(grad, *ctx.saved_tensors, *ctx.geometry, needs)
    x, weight, *mixing = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
    return x, weight, None, *mixing, None, None, None, None, None, None


torch.library.register_autograd("dyconvert::dynamic_conv", _differentiate, setup_context=_setup, lib=_library)


# ---- Compressed weights: for inference alone ----


def compressed_conv(operands: Operands, bank: Compressed) -> Tensor:
    """A dynamic conv of a compressed bank, padding in numbers; the operands' weight are the bank's differences."""
    return torch.ops.dyconvert.compressed_conv(operands.x, *bank, *_flat(operands))


def implement_compressed(engine: Callable[[Operands, Compressed], Tensor]) -> None:
    """Say what computes `compressed_conv`: it is made of all strategies, which know this file and not the reverse."""

    @torch.library.impl(_library, "compressed_conv", "CPU")
    def _(x: Tensor, mean: Tensor, differences: Tensor, scale: Tensor | None, *flat: Any) -> Tensor:
        out = engine(_operands(x, differences, *flat), Compressed(mean, differences, scale))
        return out.contiguous(memory_format=_format(x)) if x.dim() == 4 else out.contiguous()


@torch.library.register_fake("dyconvert::compressed_conv", lib=_library)  # type: ignore[untyped-decorator]
def _(x: Tensor, mean: Tensor, differences: Tensor, scale: Tensor | None, *flat: Any) -> Tensor:
    out = x.new_empty(_size_of_output(_operands(x, differences, *flat)))
    return out.contiguous(memory_format=_format(x)) if x.dim() == 4 else out


def compressed_linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor) -> Tensor:
    """A linear layer of compressed weights."""
    return torch.ops.dyconvert.compressed_linear(x, weight, scale, bias)


@torch.library.impl(_library, "compressed_linear", "CPU")
def _compressed_linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor) -> Tensor:
    out = native.linear(x, weight, scale, bias)
    return plain_linear(x, weight, scale, bias) if out is None else out


@torch.library.register_fake("dyconvert::compressed_linear", lib=_library)  # type: ignore[untyped-decorator]
def _(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], len(weight))
