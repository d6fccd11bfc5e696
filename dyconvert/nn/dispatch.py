"""dynamic_conv: which strategy computes a dynamic conv, and running it."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyconvert.errors import DyconvertError
from dyconvert.nn import choice, compile_op, engines, fitting, native, recompute, strategies, tiles
from dyconvert.nn.backward import MixedAgainConv
from dyconvert.nn.compress import read_as_they_are, unpacked
from dyconvert.nn.compressed import Compressed
from dyconvert.nn.engines import Engine
from dyconvert.nn.mixing import mix
from dyconvert.nn.mixture import Mixing, Mixture
from dyconvert.nn.native import size_of_output
from dyconvert.nn.operands import Geometry, Operands
from dyconvert.nn.padding import amounts_of_padding
from dyconvert.nn.trials import key, needs_backward, trial
from dyconvert.nn.triton import engine as triton
from dyconvert.torch_internals.watching import observed

_is_tracing = torch.jit.is_tracing  # type: ignore[attr-defined]  # torch documents it, and doesn't export it

Strategy = Callable[[Operands], Tensor]


def tiled(operands: Operands, tile: tiles.Tile | None = None) -> Tensor:
    """A few images and output channels at a time, for CPUs; keeps no image's kernel for backward."""
    return _run_engine((tiles, tile), operands)


def _run_engine(named: tuple[Engine, Any] | None, operands: Operands) -> Tensor:
    """By the engine `named`, and how it is to compute; None: by the rule's, or, for training with small kernels, by
    one grouped conv."""
    operands = _number_the_padding(operands)
    x, weight, bias, mixing, *_ = operands
    backward = needs_backward(x, weight, bias, *mixing)
    engine, how = named or engines.by_rule(operands, backward=backward)
    if not backward:
        return engine.forward(operands, how)
    if named is None and engine is not native and _kernels_are_small(x, weight, mixing):
        return strategies.groups(operands)
    return _differentiable(engine, how, operands)


_ENGINES: dict[str, Strategy] = {name: partial(_run_engine, engine) for name, engine in engines.ENGINES.items()}
# Those that know every conv.
STRATEGIES: dict[str, Strategy] = {
    "native": partial(_run_engine, None),  # the engine that the rule names
    "tiled": tiled,
    "groups": strategies.groups,
    "unfold": strategies.unfold,
    **{name: strategy for name, strategy in _ENGINES.items() if name not in triton.TILES},
    "features": strategies.features,
}
_ALL = {**STRATEGIES, **_ENGINES}


# Strategies that take half-precision banks, and the shift, by themselves, where no backward follows.
_WITH_SHIFT = ("native", "tiled", *engines.ENGINES)


_forced: ContextVar[str | None] = ContextVar("forced strategy", default=None)


@contextmanager
def force(name: str | None) -> Iterator[None]:
    """Within it, every dynamic conv of this thread is computed by the strategy `name`; None: by the best one.

    Raises:
        DyconvertError: there is no such strategy.
    """
    if name is not None and name not in _ALL:
        raise DyconvertError(f"There is no strategy {name!r}. The strategies are {', '.join(_ALL)}.")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def dynamic_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficients: Tensor | Mixture,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
    shift: Tensor | None = None,
) -> Tensor:
    """Convolve every image with the kernel that its own coefficients mix.

    Args:
        x: `[N, C_in, *spatial]`
        weight: the bank, `[g * C_out, C_in / groups, *kernel]`, expert by expert. It may be of half precision where
            the input isn't: it is read at half the cost then, and mixed kernels are as exact as it is.
        bias: `[g * C_out]` or None.
        coefficients: `[N, g, 1]`, `[N, g, C_out]`, or a whole :class:`~dyconvert.nn.mixture.Mixture`.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`.
        shift: `[C_out]` or None: added to every image's output, unmixed.

    Returns:
        `[N, C_out, *spatial]`

    Raises:
        ArgumentError: they don't fit together.
    """
    mixing = Mixing.of(coefficients, weight.shape, groups, bias is not None)
    return _computed(Operands(x, weight, bias, mixing, Geometry(stride, padding, dilation, groups), shift))


def _computed(operands: Operands) -> Tensor:
    x, weight, bias, mixing, geometry, shift = operands
    # At a batch of one each question asked here is felt, and a device's type takes longer to read than all others.
    device = "cpu" if x.is_cpu else x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # autocast doesn't know the meta device
        x, weight, bias, *axes = _autocast(x, weight, bias, *mixing)
        mixing = Mixing(*axes)
        operands = Operands(x, weight, bias, mixing, geometry, shift)
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    forced = _forced.get()
    if compiling and not forced and compile_op.takes(x, weight, needs_backward(x, weight, bias, *mixing, shift)):
        return _compiling(operands)
    if forced in triton.TILES:
        reason = triton.why_not(operands, training=needs_backward(x, weight, bias, *mixing))
        if reason is not None:
            raise DyconvertError(f"The Triton kernels can't compute this conv: {reason}. Force another strategy.")
    return _run(forced or _choose(operands), operands)


def compressed_conv(
    x: Tensor,
    bank: Compressed,
    bias: Tensor | None,
    coefficients: Tensor | Mixture,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
    shift: Tensor | None = None,
) -> Tensor:
    """As :func:`dynamic_conv`, of a compressed bank, which the compiled kernels read as it is; others unpack it."""
    mixing = Mixing.of(coefficients, bank.differences.shape, groups)
    geometry = Geometry(stride, padding, dilation, groups)
    return mixed_compressed(Operands(x, bank.differences, bias, mixing, geometry, shift), bank)


def mixed_compressed(operands: Operands, bank: Compressed) -> Tensor:
    """:func:`compressed_conv`, of a mixture that is folded already; the operands' weight are the bank's differences."""
    x, _, bias, mixing, geometry, shift = operands
    if _forced.get() is None and read_as_they_are(x, bank.mean, bias, *mixing, shift):
        numbered = operands
        if isinstance(geometry.padding, str):
            like = bank.mean.flatten()[:1].expand(bank.differences.shape)  # what shows the bank's shape and type
            numbered = _number_the_padding(operands._replace(weight=like))._replace(weight=bank.differences)
        if torch.compiler.is_compiling():
            return compile_op.compressed_conv(numbered, bank)
        call = native.prepare(numbered, bank)
        if call is not None:
            return native.forward(numbered, call, bank)
    return _computed(operands._replace(weight=unpacked(bank, mixing.g, geometry.groups).flatten(0, 1)))


compile_op.implement_compressed(mixed_compressed)


def _run(strategy: str, operands: Operands) -> Tensor:
    x, weight, bias, mixing, geometry, shift = operands
    alone = strategy in _WITH_SHIFT and not needs_backward(x, weight, bias, *mixing, shift)
    by_rule = alone and strategy == "native"  # which checks at less cost
    # While compiling or tracing, symbols stand for sizes.
    if not by_rule and not torch.compiler.is_compiling() and not _is_tracing():
        fitting.check(operands)
    if alone:
        return _ALL[strategy](operands)
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return _with_shift(_ALL[strategy](Operands(x, weight, bias, mixing, geometry)), shift)


def _compiling(operands: Operands) -> Tensor:
    """By an engine within what `torch.compile` makes."""
    operands = _number_the_padding(operands)
    x, weight, bias, mixing, geometry, shift = operands
    if not needs_backward(x, weight, bias, *mixing, shift):
        return compile_op.dynamic_conv(operands)
    out = compile_op.dynamic_conv(Operands(x, weight.to(x.dtype), None, mixing, geometry), training=True)
    out = _with_bias(out, bias if bias is None else bias.to(x.dtype), mixing)
    return _with_shift(out, shift)


def _choose(operands: Operands) -> str:
    x = operands.x
    batch = x.shape[0] if x.dim() else 0  # what doesn't fit is refused later
    single = isinstance(batch, int) and batch == 1
    if isinstance(batch, int) and batch == 0:
        return "unfold"  # the one that doesn't make pieces of the batch
    if torch.compiler.is_compiling() or _is_tracing() or not isinstance(batch, int):
        # A group count is a constant of the graph, so folding the batch into it would fix the batch.
        return "groups" if single else "unfold"
    if x.is_meta or observed():
        return recompute.by_rule(operands)
    choices = choice.current()
    if choices.cpu or _is_gpu(x):
        return _measured(choices, operands)
    if len(choices) and (known := choices.known(key(operands))):
        return known  # by `tune`
    return "native"


def _is_gpu(x: Tensor) -> bool:
    """Whether it is on a device for which there is no rule worth the name."""
    return not x.is_cpu and x.device.type in ("cuda", "mps", "xpu")


def _measured(choices: choice.Choices, operands: Operands) -> str:
    """The fastest strategy; where nothing may be measured, what is known already, else the rule's."""
    x = operands.x
    mode = choice.mode()
    # A fake tensor takes no time.
    if mode == "off" or engines.deterministic() or type(x) not in (Tensor, nn.Parameter):
        return "native"
    operands = operands._replace(geometry=fitting.numbered(operands.geometry))
    shape = key(operands)
    if known := choices.known(shape):
        return known
    fitting.check(operands)  # else every strategy would be found to fail
    # What was read, but never ran here, isn't compiled yet: a graph's capture is no time to do it.
    if engines.capturing(x):
        return "native"
    if mode == "read-only":
        return choices.read(shape) or "native"
    return choices.choose(shape, trials(operands), "native")


# Unfolded inputs of more bytes aren't tried: what they take would be missing elsewhere.
_UNFOLDED = 512 * 2**20


def trials(operands: Operands) -> dict[str, Callable[[], None]]:
    """What is to be timed to find the fastest strategy: each that can serve a call like this one.

    In training, strategies that keep every image's kernel are tried where those are small. Mixing feature maps takes
    g times the work, and is tried on GPUs, where the maps are small beside the kernels (`docs/kernels.md`).
    """
    x, weight, bias, mixing, geometry, _ = operands
    training = needs_backward(x, weight, bias, *mixing)
    if not _is_gpu(x):
        names = ["native", "tiled", "groups", "unfold"]
    else:
        names = list(engines.ENGINES)
        if triton.why_not(operands, training=training) is not None:
            names = [name for name in names if name not in triton.TILES]
        if weight.shape[2:].numel() * x.numel() * x.element_size() > _UNFOLDED:
            names.remove("recompute_unfold")
        if training and _kernels_are_small(x, weight, mixing):
            names.append(recompute.by_rule(operands))
        if mixing.factors is None and _maps_are_small(operands):
            names.append("features")
    tensors = (x, weight, bias, *mixing)
    return {name: trial(partial(_run_on, name, geometry), tensors) for name in names}


def _run_on(
    name: str, geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, *mixing: Tensor | None
) -> Tensor:
    return _run(name, Operands(x, weight, bias, Mixing(*mixing), geometry))


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast does to a conv's arguments: an autograd function doesn't see it in its backward."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _kernels_are_small(x: Tensor, weight: Tensor, mixing: Mixing) -> bool:
    """Whether keeping the kernels for backward costs little beside the input, which is kept anyway."""
    return not mixing.per_channel and 4 * mixing.images * weight.numel() <= mixing.g * x.numel()


def _maps_are_small(operands: Operands) -> bool:
    """Whether an image's outputs, of all experts, take no more memory than its kernel."""
    x, weight, _, mixing, geometry, _ = _number_the_padding(operands)
    pixels = math.prod(size_of_output(x.shape[2:], weight.shape[2:], geometry))
    return mixing.g * pixels <= weight[0].numel()


def _differentiable(engine: Engine, how: Any, operands: Operands) -> Tensor:
    """A dynamic conv whose kernels are mixed again for backward; its bias is left to autograd."""
    x, weight, bias, mixing, geometry, _ = operands
    return _with_bias(MixedAgainConv.apply(x, weight, *mixing, geometry, engine, how), bias, mixing)


def _with_shift(out: Tensor, shift: Tensor | None) -> Tensor:
    return out if shift is None else out + shift.view(-1, *[1] * (out.dim() - 2))


def _with_bias(out: Tensor, bias: Tensor | None, mixing: Mixing) -> Tensor:
    if bias is None:
        return out
    mixed = mix(bias.unflatten(0, (mixing.g, -1)), mixing.coefficients)
    return out + mixed.view(*mixed.shape, *[1] * (out.dim() - 2))


def _number_the_padding(operands: Operands) -> Operands:
    """ "same" and "valid" as numbers, with what is uneven about them put onto the input."""
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
