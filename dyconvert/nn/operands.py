"""Operands: what one dynamic conv computes with, in the one order in which functions take it; and its gradients."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from dyconvert.nn.mixture import Mixing


class Geometry(NamedTuple):
    """How a conv walks over its input: what `torch.nn.functional.conv2d` calls by these names."""

    stride: Sequence[int]
    padding: Sequence[int] | str
    dilation: Sequence[int]
    groups: int


class Operands(NamedTuple):
    """All that one dynamic conv computes with, in the order of :func:`~dyconvert.nn.dynamic_conv`'s arguments.

    Attributes:
        x: `[N, C_in, *spatial]`
        weight: the bank, `[g * C_out, C_in / groups, *kernel]`, expert by expert.
        bias: `[g * C_out]` or None.
        mixing: the images' coefficients and factors.
        geometry: engines get the padding in numbers.
        shift: `[C_out]` or None: added to every image's output, unmixed.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    mixing: Mixing
    geometry: Geometry
    shift: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients are needed."""

    x: bool
    weight: bool
    coefficients: bool
    factors: bool

    @property
    def kernels(self) -> bool:
        """Whether those of the mixed kernels are, from which all but the input's come."""
        return self.weight or self.coefficients or self.factors


class Gradients(NamedTuple):
    """A gradient has the shape of its operand, and is None where it isn't needed."""

    x: Tensor | None
    weight: Tensor | None
    coefficients: Tensor | None
    factors: Tensor | None
