"""DynamicConv1d/2d/3d: a conv with g weight sets, mixed per image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyconvert.nn.kernels import dynamic_conv
from dyconvert.nn.padding import TF_SAME, amounts_of_padding, pad_tf_same
from dyconvert.nn.predictor import CoefficientPredictor

# Leaves to symbolic tracing: they depend on shapes, which a Proxy doesn't know.
torch.fx.wrap("dynamic_conv")
torch.fx.wrap("pad_tf_same")


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
