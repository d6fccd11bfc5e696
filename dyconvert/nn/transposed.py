"""DynamicConvTranspose1d/2d/3d: a transposed conv with g weight sets, mixed per image."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvTransposeNd

from dyconvert.nn.conv import DynamicConv
from dyconvert.nn.mixing import mix

torch.fx.wrap("dynamic_conv_transpose")

_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def dynamic_conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficients: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    """Convolve every image, transposed, with the kernel that its own coefficients mix.

    Args:
        x: `[N, C_in, *spatial]`
        weight: the bank, `[g * C_in, C_out / groups, *kernel]`, expert by expert.
        bias: `[g * C_out]` or None.
        coefficients: `[N, g, 1]` or `[N, g, C_out]`.
        stride, padding, output_padding, groups, dilation: as in `torch.nn.functional.conv_transpose2d`.

    Returns:
        `[N, C_out, *spatial]`
    """
    batch, g = coefficients.shape[:2]
    # The output channel stands second in each group; mixing wants it first.
    bank = weight.unflatten(0, (g, groups, -1)).transpose(2, 3)  # [g, G, C_out / G, C_in / G, *kernel]
    kernel = mix(bank.flatten(1, 2), coefficients)  # [N, C_out, C_in / G, *kernel]
    kernel = kernel.unflatten(1, (groups, -1)).transpose(2, 3).flatten(0, 2)  # [N * C_in, C_out / G, *kernel]
    mixed_bias = None if bias is None else mix(bias.unflatten(0, (g, -1)), coefficients).flatten()
    out = _CONV_TRANSPOSE[x.dim() - 2](
        x.reshape(1, -1, *x.shape[2:]),
        kernel,
        mixed_bias,
        stride,
        padding,
        output_padding,
        groups * batch,
        dilation,
    )
    return out.unflatten(1, (batch, -1)).squeeze(0)


class DynamicConvTranspose(DynamicConv):
    r"""A transposed conv whose kernel is mixed per image from g experts.

    As :class:`DynamicConv`, but for `weight`: the bank `[g * C_in, C_out / groups, *kernel]`, and
    `output_padding` and `output_size`, which are those of `nn.ConvTranspose2d`.
    """

    def __init__(self, *args: Any, output_padding: Sequence[int], **options: Any) -> None:
        super().__init__(*args, **options)
        self.output_padding = tuple(output_padding)

    def forward(self, x: Tensor, output_size: list[int] | None = None, coefficients: Tensor | None = None) -> Tensor:
        output_padding = _ConvTransposeNd._output_padding(
            self, x, output_size, self.stride, self.padding, self.kernel_size, self.spatial_dims, self.dilation
        )
        out = dynamic_conv_transpose(
            x,
            self.weight,
            self.bias,
            self._coefficients(x) if coefficients is None else coefficients,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )
        return self._shifted(out)


class DynamicConvTranspose1d(DynamicConvTranspose):
    __doc__ = DynamicConvTranspose.__doc__
    spatial_dims = 1


class DynamicConvTranspose2d(DynamicConvTranspose):
    __doc__ = DynamicConvTranspose.__doc__
    spatial_dims = 2


class DynamicConvTranspose3d(DynamicConvTranspose):
    __doc__ = DynamicConvTranspose.__doc__
    spatial_dims = 3
