r"""Compressed banks, for inference: the experts' mean, and their differences from it in few bits.

.. math:: w_i = \bar w + s_i \odot q_i

with the mean :math:`\bar w` in the original's dtype, and :math:`q_i` in bfloat16 (:math:`s_i = 1`) or int8, with a
scale for each expert and output channel. Experts are alike, so their differences need fewer bits than they do.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dyconvert.nn import compile_op, native_library
from dyconvert.nn.compressed import Compressed
from dyconvert.nn.trials import is_tracing, needs_backward
from dyconvert.torch_internals.watching import observed

# The dtypes in which differences can be stored.
DTYPES = {"int8": torch.int8, "bfloat16": torch.bfloat16}
# Kernels of fewer elements an output channel, those of depthwise convs mostly, aren't compressed: their scales would be
# about as many bytes as they save.
SHORTEST = 32
LARGEST = 127


def compressed(experts: Tensor, dtype: torch.dtype, groups: int, *, transposed: bool = False) -> Compressed:
    """The bank that is nearest to these experts.

    The mean takes up what the differences lose together: while all coefficients are equal, the mixture is exact.

    Args:
        experts: `[g, C_out, C_in / groups, *kernel]`; of a transposed conv `[g, C_in, C_out / groups, *kernel]`.
        dtype: `torch.int8` or `torch.bfloat16`.
    """
    g, dims = len(experts), experts.dim() - 3
    wide = torch.promote_types(experts.dtype, torch.float32)
    experts = experts.detach()
    mean = experts.mean(0, dtype=wide)
    packed = torch.empty_like(experts, dtype=dtype)
    scales = []
    lost = torch.zeros_like(mean)
    for expert, place in zip(experts, packed, strict=True):  # one at a time: of all there may be no room for copies
        difference = expert - mean
        factors: Tensor | float = 1.0
        if dtype is torch.int8:
            scales.append(scale_of(_by_output(difference, groups) if transposed else difference).to(experts.dtype))
            factors = per_output(scales[-1].to(wide)[None], dims, groups, expert.shape[0] if transposed else None)[0]
            place.copy_((difference / factors).round_().clamp_(-LARGEST, LARGEST))
        else:
            place.copy_(difference)
        lost += difference.sub_(place.to(wide).mul_(factors))
    return Compressed(
        (mean + lost / g).to(experts.dtype), packed.flatten(0, 1), torch.stack(scales) if scales else None
    )


def _by_output(kernel: Tensor, groups: int) -> Tensor:
    """A transposed conv's `[C_in, C_out / groups, *kernel]` as `[C_out, C_in / groups, *kernel]`."""
    return kernel.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def scale_of(rows: Tensor) -> Tensor:
    """The scale at which int8 reaches each row's largest value, `[rows]`."""
    largest = rows.abs().flatten(1).amax(1)
    return torch.where(largest > 0, largest / LARGEST, 1)


def unpacked(bank: Compressed, g: int, groups: int, *, transposed: bool = False) -> Tensor:
    """The experts of a compressed bank, in the mean's dtype: `[g, *mean.shape]`."""
    differences = bank.differences.unflatten(0, (g, -1)).to(bank.mean.dtype)
    if bank.scale is not None:
        channels = bank.mean.shape[0] if transposed else None
        differences = differences * per_output(bank.scale, bank.mean.dim() - 2, groups, channels)
    return differences + bank.mean


def per_output(factors: Tensor, spatial_dims: int, groups: int, in_channels: int | None = None) -> Tensor:
    """`[g, 1 | C_out]` as what multiplies experts, `[g, C_out, C_in / groups, *kernel]`.

    Args:
        in_channels: of a transposed conv, whose experts are `[g, C_in, C_out / groups, *kernel]`; else None.
    """
    spatial = [1] * spatial_dims
    if factors.shape[1] == 1 or in_channels is None:
        return factors.reshape(len(factors), -1, 1, *spatial)
    # The output channel stands second in each group of a kernel.
    by_group = factors.reshape(len(factors), groups, 1, -1).expand(-1, -1, in_channels // groups, -1)
    return by_group.reshape(len(factors), in_channels, -1, *spatial)


def worth_it(kernel: Sequence[int]) -> bool:
    """Whether a bank becomes smaller; `kernel` is one output channel's shape, `[C_in / groups, *kernel]`."""
    return math.prod(kernel) >= SHORTEST


def read_as_they_are(*tensors: Tensor | None) -> bool:
    """Whether the compiled kernels may read compressed weights, the first of the tensors being the input.

    Where something looks at the operations, or records them for another program, it is to see plain ones.
    """
    x = tensors[0]
    if not x.is_cpu or x.dtype is not torch.float32 or torch.is_autocast_enabled("cpu") or needs_backward(*tensors):
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting() and compile_op.built()
    return native_library.library() is not None and not is_tracing() and not observed()
