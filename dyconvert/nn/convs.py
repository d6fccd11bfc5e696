"""DynamicConv1d/2d/3d and DynamicConvTranspose1d/2d/3d: convs with g weight sets, mixed per image."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from dyconvert.nn.dispatch import dynamic_conv
from dyconvert.nn.mixing import mix
from dyconvert.nn.padding import TF_SAME, amounts_of_padding, pad_tf_same
from dyconvert.nn.predictor import CoefficientPredictor

# Leaves to symbolic tracing: they depend on shapes, which a Proxy doesn't know.
torch.fx.wrap("dynamic_conv")
torch.fx.wrap("dynamic_conv_transpose")
torch.fx.wrap("pad_tf_same")

_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class DynamicConv(nn.Module):
    r"""A conv whose kernel is mixed per image from g experts, :math:`\tilde w = \sum_i \eta^i w^i`.

    The coefficients come from the predictor of the block that the conv stands in, as the second argument,
    or else from the conv's own predictor, reading the conv's input.

    The parameters keep the names and the number of dimensions that they have in the static conv, so that
    memory formats, initialisers and weight-decay rules go on working:

    - `weight`: the bank `[g * C_out, C_in / groups, *kernel]`, expert by expert
      (`weight.unflatten(0, (g, -1))` has one expert per index);
    - `bias`: `[g * C_out]`, or None;
    - `shift`: `[C_out]`, or None: added after mixing, the same for every image. Only
      :func:`~dyconvert.surgery.fuse.fuse` sets it, for a batch norm's shift that is not to be mixed.

    Attributes other than these are the static conv's (`stride`, `padding_mode`, ...), beside `g` and
    `coefficients_per`: `"layer"` or `"channel"`.

    Shape:
        - Input: `[N, C_in, *spatial]`; coefficients `[N, g, 1]` or `[N, g, C_out]`
        - Output: `[N, C_out, *spatial]`
    """

    spatial_dims: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        *,
        g: int,
        coefficients_per: str = "channel",
        stride: Sequence[int],
        padding: Sequence[int] | str,
        dilation: Sequence[int],
        groups: int = 1,
        padding_mode: str = "zeros",
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        coefficient_predictor: CoefficientPredictor | None = None,
        shift: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = tuple(kernel_size)
        self.g = g
        self.coefficients_per = coefficients_per
        self.stride = tuple(stride)
        self.padding = padding if isinstance(padding, str) else tuple(padding)
        self.dilation = tuple(dilation)
        self.groups = groups
        self.padding_mode = padding_mode
        self.weight = weight
        self.register_parameter("bias", bias)
        self.register_parameter("shift", shift)
        self.coefficient_predictor = coefficient_predictor
        self._explicit_padding = (
            None if padding_mode == "zeros" else amounts_of_padding(self.kernel_size, self.padding, self.dilation)
        )

    def forward(self, x: Tensor, coefficients: Tensor | None = None) -> Tensor:
        if coefficients is None:
            coefficients = self._coefficients(x)
        x, padding = self.padded(x)
        return dynamic_conv(
            x, self.weight, self.bias, coefficients, self.stride, padding, self.dilation, self.groups, self.shift
        )

    def padded(self, x: Tensor) -> tuple[Tensor, Sequence[int] | str]:
        """The input with what :func:`dynamic_conv` can't pad by put onto it, and the padding that is left to it."""
        if self._explicit_padding is not None:
            x = F.pad(x, self._explicit_padding, mode=self.padding_mode)
        elif self.padding == TF_SAME:
            x = pad_tf_same(x, self.kernel_size, self.stride, self.dilation)
        else:
            return x, self.padding
        return x, (0,) * self.spatial_dims

    def _coefficients(self, x: Tensor) -> Tensor:
        if self.coefficient_predictor is None:
            raise RuntimeError(
                "This dynamic conv takes its coefficients from the predictor of its block, but was called from "
                "outside the block's forward. Convert it with a predictor of its own: plan.unshare(conv), or "
                "scope='layer'."
            )
        return self.coefficient_predictor(x)[0]

    def _shifted(self, out: Tensor) -> Tensor:
        return out if self.shift is None else out + self.shift.view(-1, *[1] * self.spatial_dims)

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, g={self.g}, coefficients_per={self.coefficients_per}"
        )
        if self.padding not in ("valid", (0,) * self.spatial_dims):
            text += f", padding={self.padding}"
        if self.dilation != (1,) * self.spatial_dims:
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        if self.shift is not None:
            text += ", shift=True"
        return text


class DynamicConv1d(DynamicConv):
    __doc__ = DynamicConv.__doc__
    spatial_dims = 1


class DynamicConv2d(DynamicConv):
    __doc__ = DynamicConv.__doc__
    spatial_dims = 2


class DynamicConv3d(DynamicConv):
    __doc__ = DynamicConv.__doc__
    spatial_dims = 3


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
