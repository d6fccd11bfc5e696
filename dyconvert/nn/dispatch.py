"""dynamic_conv: the call by which every dynamic conv is computed, eager, compiled or with compressed weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from dyconvert.errors import DyconvertError
from dyconvert.nn import compile_op, native
from dyconvert.nn.choosing import choose
from dyconvert.nn.compress import read_as_they_are, unpacked
from dyconvert.nn.compressed import Compressed
from dyconvert.nn.mixture import Mixing, Mixture
from dyconvert.nn.operands import Geometry, Operands
from dyconvert.nn.running import ALL, number_the_padding, run, with_bias, with_shift
from dyconvert.nn.trials import needs_backward
from dyconvert.nn.triton import engine as triton

_forced: ContextVar[str | None] = ContextVar("forced strategy", default=None)


@contextmanager
def force(name: str | None) -> Iterator[None]:
    """Within it, every dynamic conv of this thread is computed by the strategy `name`; None: by the best one.

    Raises:
        DyconvertError: there is no such strategy.
    """
    if name is not None and name not in ALL:
        raise DyconvertError(f"There is no strategy {name!r}. The strategies are {', '.join(ALL)}.")
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
    return run(forced or choose(operands), operands)


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
            numbered = number_the_padding(operands._replace(weight=like))._replace(weight=bank.differences)
        if torch.compiler.is_compiling():
            return compile_op.compressed_conv(numbered, bank)
        call = native.prepare(numbered, bank)
        if call is not None:
            return native.forward(numbered, call, bank)
    return _computed(operands._replace(weight=unpacked(bank, mixing.g, geometry.groups).flatten(0, 1)))


compile_op.implement_compressed(mixed_compressed)


def _compiling(operands: Operands) -> Tensor:
    """Run an engine as one operator in a graph of `torch.compile`."""
    operands = number_the_padding(operands)
    x, weight, bias, mixing, geometry, shift = operands
    if not needs_backward(x, weight, bias, *mixing, shift):
        return compile_op.dynamic_conv(operands)
    out = compile_op.dynamic_conv(Operands(x, weight.to(x.dtype), None, mixing, geometry), training=True)
    out = with_bias(out, bias if bias is None else bias.to(x.dtype), mixing)
    return with_shift(out, shift)


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast a conv's arguments as autocast does: in an autograd function's backward, autocast is off."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
