"""DynamicConvTranspose1d/2d/3d: transposed convs with g weight sets, mixed per image."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyconvert.methods import Method
from dyconvert.nn.convs import DynamicConv
from dyconvert.nn.fitting import check_transposed
from dyconvert.nn.handing import mixture_for
from dyconvert.nn.mixing import kernels_of, mix
from dyconvert.nn.mixture import Mixing, Mixture
from dyconvert.torch_internals.modules import output_padding as output_padding_for

# A leaf to symbolic tracing: it depends on shapes, which a Proxy doesn't know.
torch.fx.wrap("dynamic_conv_transpose")

_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def dynamic_conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficients: Tensor | Mixture,
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
        coefficients: `[N, g, 1]`, `[N, g, C_out]`, or a whole :class:`~dyconvert.nn.mixture.Mixture`.
        stride, padding, output_padding, groups, dilation: as in `torch.nn.functional.conv_transpose2d`.

    Returns:
        `[N, C_out, *spatial]`

    Raises:
        ArgumentError: which argument doesn't fit, and what would.
    """
    mixing = _folded(coefficients, x, weight, groups)
    check_transposed(x, weight, bias, mixing.coefficients, groups)
    batch, g = mixing.images, mixing.g
    if batch == 0:
        return _transpose_of_nothing(x, weight, bias, g, stride, padding, output_padding, groups, dilation)
    # The output channel stands second in each group; mixing wants it first.
    bank = weight.unflatten(0, (g, groups, -1)).transpose(2, 3)  # [g, G, C_out / G, C_in / G, *kernel]
    kernel = kernels_of(bank.flatten(1, 2), mixing)  # [N, C_out, C_in / G, *kernel]
    kernel = kernel.unflatten(1, (groups, -1)).transpose(2, 3).flatten(0, 2)  # [N * C_in, C_out / G, *kernel]
    mixed_bias = None if bias is None else mix(bias.unflatten(0, (g, -1)), mixing.coefficients).flatten()
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


def _folded(mixture: Tensor | Mixture, x: Tensor, weight: Tensor, groups: int) -> Mixing:
    """A mixture for a transposed conv's bank, whose kernels are taken with their output channels first."""
    if isinstance(mixture, Tensor):
        return Mixing(mixture)
    shape = (mixture.experts.shape[1] * weight.shape[1] * groups, x.shape[1] // groups, *weight.shape[2:])
    return Mixing.of(mixture, shape, groups)


def _transpose_of_nothing(x: Tensor, weight: Tensor, bias: Tensor | None, g: int, *geometry: Any) -> Tensor:
    """The output for an empty batch: any kernel gives it."""
    return _CONV_TRANSPOSE[x.dim() - 2](x, weight.chunk(g)[0], None if bias is None else bias.chunk(g)[0], *geometry)


class DynamicConvTranspose(DynamicConv):
    r"""A transposed conv whose kernel is mixed per image from g experts.

    As :class:`DynamicConv`, but for `weight`: the bank `[g * C_in, C_out / groups, *kernel]`, and
    `output_padding` and `output_size`, which are those of `nn.ConvTranspose2d`.
    """

    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        g: int | None = None,
        method: str | Method = "dynet",
    ) -> None:
        if padding_mode != "zeros":
            raise ValueError("A transposed conv pads with zeros only: padding_mode='zeros'.")
        geometry = (stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *geometry, g=g, method=method)
        self.output_padding = self._each(output_padding)

    @classmethod
    def from_conv(cls, conv: nn.Module, method: Method, **parts: Any) -> "DynamicConvTranspose":
        """As :meth:`DynamicConv.from_conv`."""
        dynamic = cast(DynamicConvTranspose, super().from_conv(conv, method, **parts))
        dynamic.output_padding = tuple(conv.output_padding)
        return dynamic

    def forward(  # type: ignore[override]  # torch's transposed convs take the size second
        self, input: Tensor, output_size: list[int] | None = None, coefficients: Tensor | Mixture | None = None
    ) -> Tensor:
        own: Any = self
        output_padding = output_padding_for(
            own, input, output_size, own.stride, own.padding, own.kernel_size, self.spatial_dims, own.dilation
        )
        if self.mean is not None:
            self._refuse_training()
        out = dynamic_conv_transpose(
            input,
            self.weight if self.mean is None else self.experts().flatten(0, 1),
            self.bias,
            mixture_for(self, input) if coefficients is None else coefficients,
            self.stride,
            own.padding,
            output_padding,
            self.groups,
            self.dilation,
        )
        return out if self.shift is None else out + self.shift.view(-1, *[1] * self.spatial_dims)

    def _per_element(self, factors: Tensor) -> Tensor:
        return factors.expand(self.groups, *factors.shape[1:]).flatten(0, 1).unsqueeze(1)


class DynamicConvTranspose1d(DynamicConvTranspose):
    __doc__ = DynamicConvTranspose.__doc__
    spatial_dims = 1


class DynamicConvTranspose2d(DynamicConvTranspose):
    __doc__ = DynamicConvTranspose.__doc__
    spatial_dims = 2


class DynamicConvTranspose3d(DynamicConvTranspose):
    __doc__ = DynamicConvTranspose.__doc__
    spatial_dims = 3
