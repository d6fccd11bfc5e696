r"""Mixture: what makes each image's kernel from the experts, along four axes; and Mixing: what engines compute it from.

.. math:: \tilde w_{t,c,k} = f_t\, e_c\, p_k \sum_i \eta^i_{(t)} w^i_{t,c,k}

for output channel t, input channel c and kernel position k. DyNet, CondConv and Dynamic Convolution have
:math:`\eta` alone; ODConv (Li et al. 2022, eq. 3) has all four. The method's data say which of them a predictor gives.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from dyconvert.errors import ArgumentError
from dyconvert.methods import Method


class Sizes(NamedTuple):
    """How many numbers a predictor gives to one conv, for each image, along each axis of a :class:`Mixture`.

    Attributes:
        g: experts.
        per: coefficients of an expert: 1, or C_out; 0: none, its one expert is taken as it is.
        outputs, inputs, positions: factors; 0: none.
    """

    g: int
    per: int
    outputs: int = 0
    inputs: int = 0
    positions: int = 0

    @property
    def per_channel(self) -> bool:
        """Whether what mixes the experts differs from one output channel to another."""
        return self.per > 1 or self.outputs > 0

    def text(self) -> str:
        """The sizes that differ from conv to conv, in words."""
        axes = [name for name in ("outputs", "inputs", "positions") if getattr(self, name)]
        return f"coefficients_per={'channel' if self.per > 1 else 'layer'}" + "".join(f", {axis}" for axis in axes)

    @property
    def factors(self) -> tuple[int, int, int] | tuple[()]:
        """The numbers of factors of outputs, inputs and positions; empty where there are none."""
        factors = self.outputs, self.inputs, self.positions
        return factors if any(factors) else ()

    @property
    def total(self) -> int:
        return self.g * self.per + sum(self.factors)


def sizes_for(method: Method, in_channels: int, out_channels: int, kernel_size: Sequence[int], groups: int) -> Sizes:
    """The sizes of the tensors that `method` predicts for a conv.

    As in ODConv's own code, a depthwise conv's output channels have no factors, which would be those of its input
    channels again, nor has the one position of a 1 x 1 kernel.
    """
    depthwise = groups == in_channels == out_channels
    taps = math.prod(kernel_size)
    return Sizes(
        method.g,
        0 if not method.mixes_experts else out_channels if method.per == "channel" else 1,
        out_channels if "outputs" in method.axes and not (depthwise and "inputs" in method.axes) else 0,
        in_channels if "inputs" in method.axes else 0,
        taps if "positions" in method.axes and taps > 1 else 0,
    )


class Mixture(NamedTuple):
    """A predictor's outputs for one conv, for N images.

    Attributes:
        experts: `[N, g, 1]`, a coefficient for each expert, or `[N, g, C_out]`, for each output channel as well.
        outputs: `[N, C_out]`: a factor for each output channel; None: 1.
        inputs: `[N, C_in]`: a factor for each input channel; None: 1.
        positions: `[N, taps]`: a factor for each position of the kernel, the last dimension fastest; None: 1.
    """

    experts: Tensor
    outputs: Tensor | None = None
    inputs: Tensor | None = None
    positions: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Mixture":
        """The mixture of what `change` makes of each axis that there is."""
        return Mixture(*(None if axis is None else change(axis) for axis in self))

    def axes(self) -> dict[str, Tensor]:
        """The axes that there are, by name."""
        return {name: axis for name, axis in zip(self._fields, self, strict=True) if axis is not None}

    def coefficients(self) -> Tensor:
        """The coefficients that mix experts and their biases: `[N, g, 1]` or `[N, g, C_out]`."""
        return self.experts if self.outputs is None else self.experts * self.outputs.unsqueeze(1)

    def factors(self, groups: int, per_group: int, kernel_size: Sequence[int]) -> Tensor | None:
        """The factors of a mixed kernel's elements: `[N, groups or 1, C_in / groups, *kernel]`; None: 1.

        Args:
            per_group: C_in / groups.
        """
        positions = None if self.positions is None else self.positions.reshape(-1, 1, 1, *kernel_size)
        if self.inputs is None:
            if positions is None or per_group == 1:
                return positions
            return positions.expand(-1, -1, per_group, *kernel_size)
        inputs = self.inputs.reshape(-1, groups, per_group, *[1] * len(kernel_size))
        return inputs.expand(-1, -1, -1, *kernel_size) if positions is None else inputs * positions

    def with_inputs_as_outputs(self, groups: int, out_channels: int) -> "Mixture":
        """The same for a conv without bias each of whose output channels reads one input channel."""
        inputs = self.inputs
        if out_channels != groups:
            inputs = inputs.repeat_interleave(out_channels // groups, 1)
        return self._replace(outputs=inputs if self.outputs is None else self.outputs * inputs, inputs=None)


class Mixing(NamedTuple):
    """A mixture as engines compute with it: all that differs from one output channel to another is in the coefficients,
    all else in the factors.

    Attributes:
        coefficients: `[N, g, 1]` or `[N, g, C_out]`.
        factors: `[N, groups, C_in / groups, *kernel]`, the factors of a mixed kernel's elements, or
            `[N, 1, C_in / groups, *kernel]`, where that is the same in all groups; None: 1.
    """

    coefficients: Tensor
    factors: Tensor | None = None

    @classmethod
    def of(cls, mixture: "Mixture | Tensor", bank: Sequence[int], groups: int, bias: bool = True) -> "Mixing":
        """Fold a mixture for a bank of the shape `[g * C_out, C_in / groups, *kernel]`; a tensor is the experts'.

        Args:
            bias: whether the experts have biases, which coefficients mix as well.

        Raises:
            ArgumentError: a factor has the wrong size.
        """
        if isinstance(mixture, Tensor):
            return cls(mixture)
        experts, outputs, inputs, positions = mixture
        if outputs is inputs is positions is None:
            return cls(experts)
        rows, per_group, *kernel_size = bank
        out_channels = rows // experts.shape[1]
        check_factors(mixture, out_channels, per_group * groups, kernel_size)
        if per_group == 1 and inputs is not None and not bias:
            mixture = mixture.with_inputs_as_outputs(groups, out_channels)
        return cls(mixture.coefficients(), mixture.factors(groups, per_group, kernel_size))

    @property
    def images(self) -> int:
        return self.coefficients.shape[0]

    @property
    def g(self) -> int:
        return self.coefficients.shape[1]

    @property
    def per_channel(self) -> bool:
        """Whether output channels have coefficients of their own."""
        return self.coefficients.shape[2] > 1

    def part(self, images: slice, channels: slice = slice(None)) -> "Mixing":
        """The mixing of some images, and some output channels; factors are the same for all channels of a group."""
        eta = self.coefficients[images]
        if self.per_channel and channels != slice(None):
            eta = eta[:, :, channels]
        return Mixing(eta, None if self.factors is None else self.factors[images])


def check_factors(mixture: Mixture, out_channels: int, in_channels: int, kernel_size: Sequence[int]) -> None:
    """Refuse factors that don't fit a conv.

    Raises:
        ArgumentError: which axis doesn't fit, and what would.
    """
    images = mixture.experts.shape[0]
    sizes = (out_channels, "C_out"), (in_channels, "C_in"), (math.prod(kernel_size), "taps")
    for name, axis, (length, meaning) in zip(mixture._fields[1:], mixture[1:], sizes, strict=True):
        if axis is not None and axis.shape != (images, length):
            raise ArgumentError(
                f"The mixture's {name} have the shape {list(axis.shape)}. They must be [N, {meaning}], here "
                f"[{images}, {length}]."
            )
