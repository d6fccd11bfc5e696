"""Running a dynamic conv by a named strategy: plain operations, or an engine with its autograd function."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyconvert.nn import engines, fitting, native, strategies, tiles
from dyconvert.nn.backward import MixedAgainConv
from dyconvert.nn.engines import Engine
from dyconvert.nn.mixing import mix
from dyconvert.nn.mixture import Mixing
from dyconvert.nn.operands import Operands
from dyconvert.nn.padding import amounts_of_padding
from dyconvert.nn.trials import is_tracing, needs_backward
from dyconvert.nn.triton import engine as triton

Strategy = Callable[[Operands], Tensor]


def tiled(operands: Operands, tile: tiles.Tile | None = None) -> Tensor:
    """A few images and output channels at a time, for CPUs; keeps no image's kernel for backward."""
    return _run_engine((tiles, tile), operands)


def _run_engine(named: tuple[Engine, Any] | None, operands: Operands) -> Tensor:
    """Run `named`, an engine and how it is to compute. None: the rule's engine, or one grouped conv for training with
    small kernels."""
    operands = number_the_padding(operands)
    x, weight, bias, mixing, *_ = operands
    backward = needs_backward(x, weight, bias, *mixing)
    engine, how = named or engines.by_rule(operands, backward=backward)
    if not backward:
        return engine.forward(operands, how)
    if named is None and engine is not native and kernels_are_small(x, weight, mixing):
        return strategies.groups(operands)
    return _differentiable(engine, how, operands)


_ENGINES: dict[str, Strategy] = {name: partial(_run_engine, engine) for name, engine in engines.ENGINES.items()}
# The strategies that know every conv.
STRATEGIES: dict[str, Strategy] = {
    "native": partial(_run_engine, None),  # the engine that the rule names
    "tiled": tiled,
    "groups": strategies.groups,
    "unfold": strategies.unfold,
    **{name: strategy for name, strategy in _ENGINES.items() if name not in triton.TILES},
    "features": strategies.features,
}
ALL = {**STRATEGIES, **_ENGINES}
# Strategies that take half-precision banks, and the shift, by themselves, where no backward follows.
_WITH_SHIFT = ("native", "tiled", *engines.ENGINES)


def run(strategy: str, operands: Operands) -> Tensor:
    x, weight, bias, mixing, geometry, shift = operands
    alone = strategy in _WITH_SHIFT and not needs_backward(x, weight, bias, *mixing, shift)
    by_rule = alone and strategy == "native"  # which checks at less cost
    # While compiling or tracing, symbols stand for sizes.
    if not by_rule and not torch.compiler.is_compiling() and not is_tracing():
        fitting.check(operands)
    if alone:
        return ALL[strategy](operands)
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return with_shift(ALL[strategy](Operands(x, weight, bias, mixing, geometry)), shift)


def kernels_are_small(x: Tensor, weight: Tensor, mixing: Mixing) -> bool:
    """Whether keeping the kernels for backward costs little beside the input, which is kept anyway."""
    return not mixing.per_channel and 4 * mixing.images * weight.numel() <= mixing.g * x.numel()


def _differentiable(engine: Engine, how: Any, operands: Operands) -> Tensor:
    """A dynamic conv whose kernels are mixed again for backward; its bias is left to autograd."""
    x, weight, bias, mixing, geometry, _ = operands
    return with_bias(MixedAgainConv.apply(x, weight, *mixing, geometry, engine, how), bias, mixing)


def with_shift(out: Tensor, shift: Tensor | None) -> Tensor:
    return out if shift is None else out + shift.view(-1, *[1] * (out.dim() - 2))


def with_bias(out: Tensor, bias: Tensor | None, mixing: Mixing) -> Tensor:
    if bias is None:
        return out
    mixed = mix(bias.unflatten(0, (mixing.g, -1)), mixing.coefficients)
    return out + mixed.view(*mixed.shape, *[1] * (out.dim() - 2))


def number_the_padding(operands: Operands) -> Operands:
    """Turn "same" and "valid" padding into numbers; uneven padding is put onto the input."""
    geometry = operands.geometry
    if not isinstance(geometry.padding, str):
        return operands
    if not torch.compiler.is_compiling():
        fitting.check(operands)  # amounts are those of what fits
    kernel_size = operands.weight.shape[2:]
    # (before, after) of the last dimension first
    amounts = amounts_of_padding(kernel_size, geometry.padding, geometry.dilation)
    if any(before != after for before, after in zip(amounts[::2], amounts[1::2], strict=True)):
        numbered = geometry._replace(padding=(0,) * len(kernel_size))
        return operands._replace(x=F.pad(operands.x, amounts), geometry=numbered)
    return operands._replace(geometry=geometry._replace(padding=tuple(reversed(amounts[::2]))))
