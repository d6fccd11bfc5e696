"""A dynamic conv as one custom operator of torch's graph, for ONNX.

Exported operation by operation, a dynamic conv becomes hundreds of nodes that compute shapes, and an `Einsum` that
transposes its bank at every run. As one operator it becomes a few nodes (`onnx_nodes.py`), and its bank is stored in
the order in which they read it.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyconvert.errors import DyconvertError
from dyconvert.exporting.onnx_nodes import mixed_conv_nodes, packed_linear_nodes
from dyconvert.nn import DynamicConv, DynamicConv1d, DynamicConv2d, DynamicConv3d
from dyconvert.nn.handing import mixture_for
from dyconvert.nn.linear import CompressedLinear
from dyconvert.nn.mixture import Mixing, Mixture
from dyconvert.nn.padding import TF_SAME, amounts_of_padding, pad_tf_same
from dyconvert.nn.strategies import CONV
from dyconvert.surgery.apply import hand_over

# Classes that become the operator.
_WRITTEN = (DynamicConv1d, DynamicConv2d, DynamicConv3d)


def prepared(model: nn.Module, dynamic_batch: bool, by_terms: bool = False) -> dict[nn.Module, nn.Module]:
    """The modules that replace the dynamic convs and compressed linear layers of `model` for the export.

    Transposed dynamic convs aren't replaced. They are exported operation by operation, which fixes the batch, because
    it is a number of groups.

    Args:
        by_terms: mix kernels with coefficients per output channel by g products and their sum, not by a batched MatMul.
            This is up to three times as fast in OpenVINO, which makes one loop of them.

    Raises:
        DyconvertError: the batch is dynamic and the model has a transposed dynamic conv.
    """
    for name, module in model.named_modules():
        if dynamic_batch and isinstance(module, DynamicConv) and type(module) not in _WRITTEN:
            raise DyconvertError(
                f"{name or 'The model'} is a {type(module).__name__}, which ONNX has for a fixed batch only. Export "
                "with `dynamic_batch=False`, don't convert it, or export for torch (export_torch, --to torch)."
            )
    dynamic = (m for m in model.modules() if isinstance(m, DynamicConv) and type(m) in _WRITTEN)
    convs: dict[nn.Module, nn.Module] = {m: MixedConv(m, dynamic_batch, by_terms) for m in dynamic}
    return convs | {m: PackedLinear(m) for m in model.modules() if isinstance(m, CompressedLinear)}


class MixedConv(nn.Module):
    """A dynamic conv whose forward is the custom operator `dyconvert::mixed_conv`.

    Args:
        conv: the conv that it replaces. Its tensors are shared if their order allows it.
        dynamic_batch: whether the number of images isn't a constant of the graph.
        by_terms: see :func:`prepared`.
    """

    def __init__(self, conv: DynamicConv, dynamic_batch: bool, by_terms: bool = False) -> None:
        super().__init__()
        self.bank_shape = tuple(conv.weight.shape)
        # In the form that F.pad takes.
        self._amounts = amounts_of_padding(conv.kernel_size, conv.padding, conv.dilation)
        self.coefficient_predictor = conv.coefficient_predictor
        self.block_predictor = conv.block_predictor
        self._handed: Mixture | None = None
        self.by_terms = by_terms
        self.tap_by_tap = dynamic_batch  # the order of patches
        self.per_channel = conv.sizes.per_channel

        def rows(kernels: Tensor) -> Tensor:  # [..., C_out, C_in / groups, *kernel] -> [..., C_out, K]
            kernels = kernels.detach().flatten(-len(conv.kernel_size))  # [..., C_out, C_in / groups, taps]
            return (kernels.transpose(-1, -2) if self.tap_by_tap else kernels).flatten(-2)

        # [C_out, g, K], or [g, C_out K]: the operand of a MatMul with the coefficients. Compressed: the same, in rows.
        experts = rows(conv.weight.unflatten(0, (conv.g, -1)))  # [g, C_out, K]
        order = experts.transpose(0, 1) if self.per_channel else experts
        compressed = conv.mean is not None
        bank = order.flatten(0, 1) if compressed else order if self.per_channel else order.flatten(1)
        self.bank = nn.Parameter(bank.contiguous(), requires_grad=False)
        self.register_parameter("mean", None)  # [C_out, K]
        self.register_parameter("scale", None)  # [rows of the bank]
        if compressed:
            self.mean = nn.Parameter(rows(conv.mean).contiguous(), requires_grad=False)
            if conv.scale is not None:
                scale = conv.scale.detach().t() if self.per_channel else conv.scale.detach()
                self.scale = nn.Parameter(scale.flatten().contiguous(), requires_grad=False)
        bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().unflatten(0, (conv.g, -1)), False)
        shift = None if conv.shift is None else nn.Parameter(conv.shift.detach().unsqueeze(0), False)
        self.register_parameter("bias", bias)  # [g, C_out]
        self.register_parameter("shift", shift)  # [1, C_out]
        # Attributes and hooks that the user has put on the conv: the forward around it may read them.
        hand_over(conv, self)

    @property
    def weight(self) -> Tensor:
        """The bank: a forward may read the dtype or the device of a conv's weight."""
        return self.bank

    def forward(self, input: Tensor, coefficients: Tensor | Mixture | None = None) -> Tensor:
        x = input
        if coefficients is None:
            coefficients = mixture_for(cast(DynamicConv, self), x)
        coefficients, factors = Mixing.of(coefficients, self.bank_shape, self.groups)
        if factors is not None:  # [N, groups or 1, 1, K], in the order of the bank's elements
            factors = factors.flatten(3)
            factors = (factors.transpose(2, 3) if self.tap_by_tap else factors).flatten(2).unsqueeze(2)
        padding = self._amounts
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, padding, mode=self.padding_mode), [0] * len(padding)
        elif self.padding == TF_SAME:
            x = pad_tf_same(x, self.kernel_size, self.stride, self.dilation)
        bias = None if self.bias is None else (coefficients * self.bias).sum(1)  # [N, C_out]
        if self.shift is not None:
            bias = self.shift if bias is None else bias + self.shift
        return torch.ops.dyconvert.mixed_conv(
            x,
            self.bank,
            coefficients,
            factors,
            bias,
            self.mean,
            self.scale,
            self.out_channels,
            list(self.kernel_size),
            list(self.stride),
            padding,
            list(self.dilation),
            self.groups,
            self.by_terms,
        )


class PackedLinear(nn.Module):
    """A predictor's compressed linear layer, whose forward is the custom operator `dyconvert::packed_linear`."""

    def __init__(self, layer: CompressedLinear) -> None:
        super().__init__()
        self.weight, self.scale, self.bias = layer.weight, layer.scale, layer.bias

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.dyconvert.packed_linear(input, self.weight, self.scale, self.bias)


@torch.library.custom_op("dyconvert::packed_linear", mutates_args=())
def packed_linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor) -> Tensor:
    raise NotImplementedError("dyconvert::packed_linear is for graphs that are being exported, and doesn't run.")


@packed_linear.register_fake
def _(x, weight, scale, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("dyconvert::mixed_conv", mutates_args=())
def mixed_conv(
    x: Tensor,
    bank: Tensor,
    coefficients: Tensor,
    factors: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    by_terms: bool,
) -> Tensor:
    raise NotImplementedError("dyconvert::mixed_conv is for graphs that are being exported, and doesn't run.")


@mixed_conv.register_fake
def _(
    x,
    bank,
    coefficients,
    factors,
    bias,
    mean,
    scale,
    out_channels,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
    by_terms,
):
    x = F.pad(x, list(padding))
    kernel = x.new_empty(out_channels, x.shape[1] // groups, *kernel_size)
    return CONV[len(kernel_size)](x, kernel, None, stride, 0, dilation, groups)


def translations() -> dict:
    """The custom_translation_table of `torch.onnx.export`."""
    return {
        torch.ops.dyconvert.mixed_conv.default: mixed_conv_nodes,
        torch.ops.dyconvert.packed_linear.default: packed_linear_nodes,
    }
