"""The engines as an operator of torch's, which `torch.compile` calls as it is.

A compiler that is shown a dynamic conv operation by operation makes matmuls of the unfolded input of it, at twice
the time. Exported programs keep the plain operations: they are to run without dyconvert.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dyconvert.errors import ArgumentError
from dyconvert.nn import engines, fitting, native
from dyconvert.nn.compressed import Compressed, plain_linear
from dyconvert.nn.mixture import Mixing
from dyconvert.nn.strategies import Geometry
from dyconvert.torch_internals.compiling import constant_result

_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
_library = torch.library.Library("dyconvert", "DEF")
_library.define(
    f"dynamic_conv(Tensor x, Tensor weight, Tensor? bias, Tensor coefficients, Tensor? factors, Tensor? shift,"
    f" {_GEOMETRY}, bool training=False) -> Tensor"
)
_library.define(
    "dynamic_conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor coefficients, Tensor? factors,"
    f" {_GEOMETRY}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "compressed_conv(Tensor x, Tensor mean, Tensor differences, Tensor? scale, Tensor? bias, Tensor coefficients,"
    f" Tensor? factors, Tensor? shift, {_GEOMETRY}) -> Tensor"
)
_library.define("compressed_linear(Tensor x, Tensor weight, Tensor? scale, Tensor bias) -> Tensor")


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


def dynamic_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mixing: Mixing,
    geometry: Geometry,
    shift: Tensor | None = None,
    *,
    training: bool = False,
) -> Tensor:
    """A strategy, padding as numbers. Differentiable but for the bias and the shift.

    Args:
        training: whether a backward may follow, by which what was measured is looked up.
    """
    numbers = [list(values) for values in geometry[:3]]
    return torch.ops.dyconvert.dynamic_conv(x, weight, bias, *mixing, shift, *numbers, geometry.groups, training)


@constant_result
def built() -> bool:
    return native.library() is not None


def _format(x: Tensor) -> torch.memory_format:
    """The output's: as the compiled kernels have it."""
    return torch.channels_last if native.writes_channels_last(x.shape, x.stride()) else torch.contiguous_format


@torch.library.impl(_library, "dynamic_conv", "CPU")
@torch.library.impl(_library, "dynamic_conv", "CUDA")
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficients: Tensor,
    factors: Tensor | None,
    shift: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    training: bool = False,
) -> Tensor:
    geometry = Geometry(stride, padding, dilation, groups)
    mixing = Mixing(coefficients, factors)
    engine, how = engines.known_or_by_rule(x, weight, bias, mixing, geometry, shift, backward=False, training=training)
    out = engine.forward(x, weight, bias, mixing, geometry, how, shift)
    return out.contiguous(memory_format=_format(x))


@torch.library.register_fake("dyconvert::dynamic_conv", lib=_library)  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficients: Tensor,
    factors: Tensor | None,
    shift: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    training: bool = False,
) -> Tensor:
    geometry = Geometry(stride, padding, dilation, groups)
    fitting.check(x, weight, bias, Mixing(coefficients, factors), geometry, shift)
    size = native.size_of_output(x.shape[2:], weight.shape[2:], geometry)
    channels = weight.shape[0] // coefficients.shape[1]
    return x.new_empty(x.shape[0], channels, *size).contiguous(memory_format=_format(x))


@torch.library.impl(_library, "dynamic_conv_backward", "CPU")
@torch.library.impl(_library, "dynamic_conv_backward", "CUDA")
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    factors: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    geometry = Geometry(stride, padding, dilation, groups)
    mixing = Mixing(coefficients, factors)
    engine, how = engines.known_or_by_rule(x, weight, None, mixing, geometry, backward=True, training=True)
    size = native.size_of_output(x.shape[2:], weight.shape[2:], geometry)
    if grad.shape != (len(x), weight.shape[0] // coefficients.shape[1], *size) or grad.dtype != x.dtype:
        raise ArgumentError(
            f"The output's gradient has the shape {list(grad.shape)} and type {grad.dtype}. They must be the output's."
        )
    found = engine.backward(grad, x, weight, mixing, geometry, (needs[0], needs[1], needs[2], needs[3]), how)
    a, b, c, d = (x.new_empty(0) if part is None else part.contiguous() for part in found)
    return a, b, c, d


@torch.library.register_fake("dyconvert::dynamic_conv_backward", lib=_library)  # type: ignore[untyped-decorator]
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    factors: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fitting.check(x, weight, None, Mixing(coefficients, factors), Geometry(stride, padding, dilation, groups))
    inputs = zip((x, weight, coefficients, factors), needs, strict=True)
    a, b, c, d = (like.new_empty(like.shape) if needed else x.new_empty(0) for like, needed in inputs)
    return a, b, c, d


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, coefficients, factors, _, *geometry, _ = inputs
    ctx.save_for_backward(x, weight, coefficients, factors)
    ctx.geometry = geometry


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[index] for index in (0, 1, 3, 4)]
    found = torch.ops.dyconvert.dynamic_conv_backward(grad, *ctx.saved_tensors, *ctx.geometry, needs)
    x, weight, eta, factors = (part if needed else None for part, needed in zip(found, needs, strict=True))
    return x, weight, None, eta, factors, None, None, None, None, None, None


torch.library.register_autograd("dyconvert::dynamic_conv", _differentiate, setup_context=_setup, lib=_library)


# ---- Compressed weights: for inference alone ----


def compressed_conv(
    x: Tensor, bank: Compressed, bias: Tensor | None, mixing: Mixing, geometry: Geometry, shift: Tensor | None
) -> Tensor:
    """A dynamic conv of a compressed bank, padding as numbers."""
    numbers = [list(values) for values in geometry[:3]]
    return torch.ops.dyconvert.compressed_conv(x, *bank, bias, *mixing, shift, *numbers, geometry.groups)


def implement_compressed(engine: Callable[..., Tensor]) -> None:
    """Say what computes `compressed_conv`: it is made of all strategies, which know this file and not the reverse."""

    @torch.library.impl(_library, "compressed_conv", "CPU")
    def _(
        x: Tensor,
        mean: Tensor,
        differences: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        coefficients: Tensor,
        factors: Tensor | None,
        shift: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> Tensor:
        bank = Compressed(mean, differences, scale)
        geometry = Geometry(stride, padding, dilation, groups)
        out = engine(x, bank, bias, Mixing(coefficients, factors), geometry, shift)
        return out.contiguous(memory_format=_format(x)) if x.dim() == 4 else out.contiguous()


@torch.library.register_fake("dyconvert::compressed_conv", lib=_library)  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    mean: Tensor,
    differences: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    coefficients: Tensor,
    factors: Tensor | None,
    shift: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    size = native.size_of_output(x.shape[2:], mean.shape[2:], Geometry(stride, padding, dilation, groups))
    out = x.new_empty(x.shape[0], len(mean), *size)
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
