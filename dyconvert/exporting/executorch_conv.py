"""A dynamic conv in the operations that ExecuTorch's XNNPACK backend computes.

XNNPACK's convs take constant kernels only; a conv with a mixed kernel is left to a portable loop, a hundred times
slower. So a dynamic conv is written as what XNNPACK has:

- **a batched matmul** of the mixed kernels with the patches of the input, which it multiplies by two matrices of which
  none is constant: as many multiply-adds as the conv, and the patches written out;
- **feature maps mixed** instead of kernels, for depthwise convs, whose matmuls would have one row each: g convs of
  constant kernels, each one's output times its coefficient (DyNet, eq. 5). Depthwise convs are few of a network's
  multiply-adds.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyconvert.nn import CoefficientPredictor, DynamicConv, DynamicConv1d, DynamicConv2d
from dyconvert.nn.handing import mixture_for
from dyconvert.nn.linear import CompressedLinear
from dyconvert.nn.mixture import Mixing, Mixture
from dyconvert.nn.padding import TF_SAME, amounts_of_padding, pad_tf_same
from dyconvert.nn.strategies import CONV
from dyconvert.surgery.apply import hand_over

_WRITTEN = (DynamicConv1d, DynamicConv2d)


def prepared(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The modules that replace the dynamic convs of `model` for the export.

    Others, of three dimensions and transposed, are exported operation by operation, to ExecuTorch's portable ones.
    """
    dynamic = (m for m in model.modules() if isinstance(m, DynamicConv) and type(m) in _WRITTEN)
    convs: dict[nn.Module, nn.Module] = {m: _replacement(m) for m in dynamic}
    return convs | {m: _plain(m) for m in model.modules() if isinstance(m, CompressedLinear)}


def _replacement(conv: DynamicConv) -> nn.Module:
    depthwise = 1 < conv.groups == conv.in_channels
    # Factors multiply the elements of mixed kernels. Where maps are mixed, there is no mixed kernel.
    return MixedMaps(conv) if depthwise and not (conv.sizes.inputs or conv.sizes.positions) else MixedMatrix(conv)


def _plain(layer: CompressedLinear) -> nn.Linear:
    """The layer with its weight unpacked: XNNPACK's linear layers take constants only."""
    outputs, inputs = layer.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    weight = layer.weight.detach().to(layer.bias.dtype)
    if layer.scale is not None:
        weight = weight * layer.scale.detach().unsqueeze(1)
    linear.weight, linear.bias = nn.Parameter(weight, False), nn.Parameter(layer.bias.detach(), False)
    return linear


class _Mixed(nn.Module):
    """The base of both forms: coefficients, padding, bias."""

    def __init__(self, conv: DynamicConv) -> None:
        super().__init__()
        # As F.pad takes it.
        self._amounts = amounts_of_padding(conv.kernel_size, conv.padding, conv.dilation)
        self.coefficient_predictor = conv.coefficient_predictor and _Predictor(conv.coefficient_predictor)
        self.block_predictor = conv.block_predictor and _Predictor(conv.block_predictor)
        self._handed: Mixture | None = None
        self.bank_shape = tuple(conv.weight.shape)
        bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().unflatten(0, (conv.g, -1)), False)
        self.register_parameter("bias", bias)  # [g, C_out]
        self.register_parameter("shift", None if conv.shift is None else nn.Parameter(conv.shift.detach(), False))

    def forward(self, input: Tensor, coefficients: Tensor | Mixture | None = None) -> Tensor:
        mixture = mixture_for(cast(DynamicConv, self), input) if coefficients is None else coefficients
        mixing = Mixing.of(mixture, self.bank_shape, self.groups)
        x, amounts = input, self._amounts
        if self.padding_mode != "zeros":
            x, amounts = F.pad(x, amounts, mode=self.padding_mode), [0] * len(amounts)
        elif self.padding == TF_SAME:
            x = pad_tf_same(x, self.kernel_size, self.stride, self.dilation)
        out = self._convolved(x, amounts, mixing)
        if self.bias is not None:
            bias = (mixing.coefficients * self.bias).sum(1)  # [N, C_out]
            out = out + bias.reshape(*bias.shape, *[1] * self._dims)
        if self.shift is not None:
            out = out + self.shift.reshape(1, -1, *[1] * self._dims)
        return out

    @property
    def _dims(self) -> int:
        return len(self.kernel_size)

    def _convolved(self, x: Tensor, amounts: list[int], mixing: Mixing) -> Tensor:
        raise NotImplementedError


class MixedMaps(_Mixed):
    """The feature maps of g constant kernels, mixed."""

    def __init__(self, conv: DynamicConv) -> None:
        super().__init__(conv)
        # Each a parameter of its own: a slice of one bank would not be a constant to the backend.
        self.kernels = nn.ParameterList(nn.Parameter(expert.clone(), False) for expert in conv.experts().detach())
        hand_over(conv, self)

    @property
    def weight(self) -> Tensor:
        """An expert: a forward may ask for the dtype or the device of a conv's weight."""
        return self.kernels[0]

    def _convolved(self, x: Tensor, amounts: list[int], mixing: Mixing) -> Tensor:
        if amounts[::2] == amounts[1::2]:
            padding = amounts[::2][::-1]
        else:
            x, padding = F.pad(x, amounts), [0] * self._dims
        eta = mixing.coefficients
        out = None
        for index, kernel in enumerate(self.kernels):
            y = CONV[self._dims](x, kernel, None, self.stride, padding, self.dilation, self.groups)
            y = y * eta.narrow(1, index, 1).reshape(-1, eta.shape[2], *[1] * self._dims)
            out = y if out is None else out + y
        return out


class MixedMatrix(_Mixed):
    """A batched matmul of the mixed kernels with the patches of the input."""

    def __init__(self, conv: DynamicConv) -> None:
        super().__init__(conv)
        experts = conv.experts().detach().flatten(3).transpose(2, 3).flatten(2)  # [g, C_out, taps C_in / groups]
        per_channel = conv.sizes.per_channel
        bank = experts.transpose(0, 1) if per_channel else experts.flatten(1)
        # [C_out, g, K], or [g, C_out K]: what a matmul with the coefficients takes.
        self.bank = nn.Parameter(bank.contiguous(), False)
        hand_over(conv, self)

    @property
    def weight(self) -> Tensor:
        """The bank: a forward may ask for the dtype or the device of a conv's weight."""
        return self.bank

    def _convolved(self, x: Tensor, amounts: list[int], mixing: Mixing) -> Tensor:
        images = x.shape[0]
        if any(amounts):
            x = F.pad(x, amounts)
        taps = self._taps(x)
        spatial = taps[0].shape[2:]
        # Tap by tap, and within a tap channel by channel: a group's patches are [taps C_in / groups, L].
        rows = [tap.reshape(images * self.groups, self.in_channels // self.groups, -1) for tap in taps]
        patches = torch.cat(rows, 1) if len(rows) > 1 else rows[0]
        kernel = self._kernel(mixing.coefficients).reshape(images * self.groups, self.out_channels // self.groups, -1)
        if mixing.factors is not None:  # [N, groups, C_in / groups, *kernel]
            kernel = kernel * mixing.factors.flatten(3).transpose(2, 3).reshape(images * self.groups, 1, -1)
        return torch.bmm(kernel, patches).reshape(images, self.out_channels, *spatial)

    def _kernel(self, eta: Tensor) -> Tensor:
        """Each image's kernel: `[N, C_out, K]`."""
        if self.bank.dim() == 2:
            return eta.flatten(1) @ self.bank
        return torch.bmm(eta.permute(2, 0, 1), self.bank).permute(1, 0, 2)

    def _taps(self, x: Tensor) -> list[Tensor]:
        """The part of the padded input that each tap meets: `[N, C_in, *out]`, the last dimension fastest."""
        taps = [x]
        for dim in range(self._dims):
            step = self.stride[dim]
            reach = self.dilation[dim] * (self.kernel_size[dim] - 1)
            if reach == 0 and step == 1:
                continue
            length = (x.shape[2 + dim] - reach - 1) // step + 1
            starts = range(0, reach + 1, self.dilation[dim])
            taps = [part for tap in taps for part in _every(tap, 2 + dim, starts, length, step)]
        return taps


def _every(x: Tensor, dim: int, starts: Sequence[int], length: int, step: int) -> list[Tensor]:
    """`x[start : start + length * step : step]` of one dimension, for each start.

    XNNPACK has slices without a step only. So a step becomes a dimension of its own, of which one part is taken.
    """
    size = x.shape[dim]
    if step == 1:
        return [x.narrow(dim, start, length) for start in starts]
    if not isinstance(size, int):  # which it has no reshape for, either
        return [x[(slice(None),) * dim + (slice(start, start + (length - 1) * step + 1, step),)] for start in starts]
    if size % step:
        x = F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, step - size % step])
    apart = x.unflatten(dim, (-1, step))
    parts = [apart.narrow(dim, start // step, length).narrow(dim + 1, start % step, 1) for start in starts]
    return [part.flatten(dim, dim + 1) for part in parts]


class _Predictor(nn.Module):
    """A predictor whose pooling is the mean that XNNPACK has: of `[N, C, H, W]`, with its dimensions kept."""

    def __init__(self, predictor: CoefficientPredictor) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, x: Any) -> tuple[Mixture, ...]:
        if isinstance(x, (list, tuple, Mapping)) or x.dim() != 4:
            return self.predictor(x)
        return self.predictor.of_pooled(x.mean((2, 3), keepdim=True).flatten(1))
