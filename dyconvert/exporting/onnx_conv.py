"""A dynamic conv as a few ONNX nodes: mix the kernel, then one Conv, or patches and one MatMul.

Exported operation by operation, a dynamic conv becomes hundreds of nodes that compute shapes, and an `Einsum`
that transposes its bank at every run. Here it is one custom operator in torch's graph, which
:func:`mixed_conv_nodes` writes in ONNX, and its bank is stored in the order in which it is read.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyconvert.errors import DyconvertError
from dyconvert.nn import DynamicConv, DynamicConv1d, DynamicConv2d, DynamicConv3d
from dyconvert.nn.handing import mixture_for
from dyconvert.nn.linear import CompressedLinear
from dyconvert.nn.mixture import Mixing, Mixture
from dyconvert.nn.padding import TF_SAME, amounts_of_padding, pad_tf_same
from dyconvert.nn.strategies import CONV
from dyconvert.surgery.apply import hand_over

_WRITTEN = (DynamicConv1d, DynamicConv2d, DynamicConv3d)


def prepared(model: nn.Module, dynamic_batch: bool, by_terms: bool = False) -> dict[nn.Module, nn.Module]:
    """What to put in the place of each dynamic conv of `model` before it is exported.

    Others, the transposed ones, are exported operation by operation, where a group count fixes the batch.

    Args:
        by_terms: kernels whose output channels have coefficients of their own are mixed by g products and their sum,
            not by a batched MatMul: up to three times as fast in OpenVINO, which makes one loop of them.

    Raises:
        DyconvertError: one of those is to be exported with a dynamic batch.
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
        conv: what it computes; its tensors are shared where their order allows it.
        dynamic_batch: the number of images is not a constant of the graph.
        by_terms: as in :func:`prepared`.
    """

    def __init__(self, conv: DynamicConv, dynamic_batch: bool, by_terms: bool = False) -> None:
        super().__init__()
        self.bank_shape = tuple(conv.weight.shape)
        # As F.pad takes it.
        self._amounts = amounts_of_padding(conv.kernel_size, conv.padding, conv.dilation)
        self.coefficient_predictor = conv.coefficient_predictor
        self.block_predictor = conv.block_predictor
        self._handed: Mixture | None = None
        self.by_terms = by_terms
        self.tap_by_tap = dynamic_batch  # as patches lie
        self.per_channel = conv.sizes.per_channel

        def rows(kernels: Tensor) -> Tensor:  # [..., C_out, C_in / groups, *kernel] -> [..., C_out, K]
            kernels = kernels.detach().flatten(-len(conv.kernel_size))  # [..., C_out, C_in / groups, taps]
            return (kernels.transpose(-1, -2) if self.tap_by_tap else kernels).flatten(-2)

        # [C_out, g, K], or [g, C_out K]: what a MatMul with the coefficients takes. Compressed, the same in rows.
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
        # The forward around it may ask for what the user has put on the conv, and its hooks take part in what it does.
        hand_over(conv, self)

    @property
    def weight(self) -> Tensor:
        """The bank: a forward may ask for the dtype or the device of a conv's weight."""
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
    raise NotImplementedError("dyconvert::packed_linear stands in graphs that are being exported, and doesn't run.")


@packed_linear.register_fake
def _(x, weight, scale, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


def packed_linear_nodes(x, weight, scale=None, bias=None):
    """The ONNX nodes of a compressed linear layer."""
    from onnxscript import opset20 as op

    return op.Gemm(x, _widened(weight, scale, bias.dtype), bias, transB=1)


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
    raise NotImplementedError("dyconvert::mixed_conv stands in graphs that are being exported, and doesn't run.")


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
    """What `torch.onnx.export` takes as its custom_translation_table."""
    return {
        torch.ops.dyconvert.mixed_conv.default: mixed_conv_nodes,
        torch.ops.dyconvert.packed_linear.default: packed_linear_nodes,
    }


def mixed_conv_nodes(
    x,
    bank,
    coefficients,
    factors=None,
    bias=None,
    mean=None,
    scale=None,
    out_channels: int = 0,
    kernel_size: Sequence[int] = (),
    stride: Sequence[int] = (),
    padding: Sequence[int] = (),
    dilation: Sequence[int] = (),
    groups: int = 1,
    by_terms: bool = False,
):
    """The ONNX nodes of one dynamic conv; the arguments are graph values and the operator's constants."""
    batch = x.shape[0]
    bank = (bank, mean, scale, by_terms)
    # ONNX pads before every dimension, first to last, and then after.
    pads = [*padding[-2::-2], *padding[::-2]]
    geometry = (list(kernel_size), list(stride), pads, list(dilation), groups)
    if isinstance(batch, int):
        return _with_conv(x, bank, coefficients, factors, bias, out_channels, batch, geometry)
    return _with_matmul(x, bank, coefficients, factors, bias, out_channels, geometry)


def _mixed(bank, coefficients, factors, shape: list[int], by_group: list[int], images: int | None):
    """Each image's kernel, image by image, in this shape.

    Args:
        factors: `[N, groups or 1, 1, K]`.
        by_group: the kernels' shape as factors multiply them, `[N, groups, C_out / groups, K]`.
    """
    from onnxscript import opset20 as op

    bank, mean, scale, by_terms = bank
    g = coefficients.shape[1]
    per_channel = coefficients.shape[2] != 1
    if mean is not None:
        channels, elements = mean.shape
        bank = _widened(bank, scale, mean.dtype)  # [g C_out, K], or [C_out g, K]
        bank = op.Reshape(bank, _ints([channels, g, elements] if per_channel else [g, channels * elements]))
    if not per_channel:
        kernel = op.MatMul(op.Squeeze(coefficients, _ints([2])), bank)  # [N, C_out K]
    elif by_terms and mean is None:
        kernel = _sum_of_terms(bank, coefficients)
    else:
        kernel = op.MatMul(op.Transpose(coefficients, perm=[2, 0, 1]), bank)  # [C_out, N, K]
        if images != 1:
            kernel = op.Transpose(kernel, perm=[1, 0, 2])
    if mean is not None:
        # What the experts have in common, as often as the coefficients say together.
        shares = op.ReduceSum(coefficients, _ints([1]), keepdims=0)  # [N, 1 | C_out]
        common = op.Mul(op.Unsqueeze(shares, _ints([2])), op.Unsqueeze(mean, _ints([0])))  # [N, C_out, K]
        kernel = op.Add(op.Reshape(kernel, _ints(by_group)), op.Reshape(common, _ints(by_group)))
    if factors is not None:
        kernel = op.Mul(op.Reshape(kernel, _ints(by_group)), factors)
    return op.Reshape(kernel, _ints(shape))


def _sum_of_terms(bank, coefficients):
    """Kernels `[N, C_out, K]` of a bank `[C_out, g, K]` and coefficients `[N, g, C_out]`, expert by expert."""
    from onnxscript import opset20 as op

    channels, g, elements = bank.shape
    total = None
    for index in range(g):
        expert = op.Reshape(_slice(bank, 1, index, g - 1 - index, 1), _ints([channels, elements]))
        factor = op.Reshape(_slice(coefficients, 1, index, g - 1 - index, 1), _ints([-1, channels, 1]))
        term = op.Mul(expert, factor)
        total = term if total is None else op.Add(total, term)
    return total


def _widened(rows, scale, dtype):
    """Rows of int8 or bfloat16 in a dtype that is computed in."""
    from onnxscript import opset20 as op

    return op.Cast(rows, to=int(dtype)) if scale is None else op.DequantizeLinear(rows, scale, axis=0)


def _with_conv(x, bank, coefficients, factors, bias, out_channels: int, batch: int, geometry: tuple):
    """A fixed batch: its images are the groups of one Conv."""
    from onnxscript import opset20 as op

    kernel_size, stride, padding, dilation, groups = geometry
    channels = x.shape[1]
    by_group = [batch, groups, out_channels // groups, channels // groups * math.prod(kernel_size)]
    kernel = _mixed(
        bank, coefficients, factors, [batch * out_channels, channels // groups, *kernel_size], by_group, batch
    )
    if bias is not None:
        if batch > 1:
            bias = op.Expand(bias, _ints([batch, out_channels]))
        bias = op.Reshape(bias, _ints([-1]))
    known = _known(x.shape[2:])
    folded = _reshape(x, [1, batch * channels], x, known) if batch > 1 else x
    out = op.Conv(
        folded,
        kernel,
        bias,
        kernel_shape=kernel_size,
        strides=stride,
        pads=padding,
        dilations=dilation,
        group=batch * groups,
    )
    return _reshape(out, [batch, out_channels], out, _out_size(known, geometry)) if batch > 1 else out


def _with_matmul(x, bank, coefficients, factors, bias, out_channels: int, geometry: tuple):
    """Any batch: one MatMul of the kernels with the patches that they meet, [N, groups, taps C_in / groups, L]."""
    from onnxscript import opset20 as op

    kernel_size, stride, padding, dilation, groups = geometry
    dims = len(kernel_size)
    per_group = x.shape[1] // groups
    size = _out_size(_known(x.shape[2:]), geometry)
    pixels = -1 if size is None else math.prod(size)  # -1 can't be told of an empty batch
    if any(padding):
        x = op.Pad(x, _ints([0, 0, *padding[:dims], 0, 0, *padding[dims:]]))
    taps = [x]
    for dim in range(dims):
        if kernel_size[dim] == stride[dim] == 1:
            continue
        reach = dilation[dim] * (kernel_size[dim] - 1)
        steps = range(0, reach + 1, dilation[dim])
        taps = [_slice(tap, 2 + dim, start, reach - start, stride[dim]) for tap in taps for start in steps]
    if len(taps) == 1:
        patches = op.Reshape(taps[0], _ints([0, groups, per_group, pixels]))
    elif groups == 1:
        patches = op.Reshape(op.Concat(*taps, axis=1), _ints([0, 1, len(taps) * per_group, pixels]))
    else:
        rows = [op.Reshape(tap, _ints([0, groups, per_group, pixels])) for tap in taps]
        patches = op.Concat(*rows, axis=2)
    taps_in = len(taps) * per_group
    by_group = [-1, groups, out_channels // groups, taps_in]
    kernel = _mixed(bank, coefficients, factors, by_group, by_group, None)
    out = op.MatMul(kernel, patches)  # [N, groups, C_out / groups, L]
    if bias is not None:
        out = op.Add(out, op.Reshape(bias, _ints([-1, groups, out_channels // groups, 1])))
    return _reshape(out, [0, out_channels], taps[0], size)


def _known(spatial) -> list[int] | None:
    return list(spatial) if all(isinstance(s, int) for s in spatial) else None


def _out_size(size: list[int] | None, geometry: tuple) -> list[int] | None:
    """The spatial size of a conv's output, where that of its input is known."""
    if size is None:
        return None
    kernel_size, stride, padding, dilation, _ = geometry
    dims = range(len(size))
    return [
        (size[d] + padding[d] + padding[len(size) + d] - dilation[d] * (kernel_size[d] - 1) - 1) // stride[d] + 1
        for d in dims
    ]


def _reshape(value, start: list[int], like, known: list[int] | None):
    """To `[*start, *spatial]`, the spatial size being that of `like`, which the graph may know only as it runs."""
    from onnxscript import opset20 as op

    if known is not None:
        return op.Reshape(value, _ints([*start, *known]))
    return op.Reshape(value, op.Concat(_ints(start), op.Shape(like, start=2), axis=0))


def _slice(value, axis: int, start: int, left: int, step: int):
    from onnxscript import opset20 as op

    end = -left if left else 2**31 - 1
    return op.Slice(value, _ints([start]), _ints([end]), _ints([axis]), _ints([step]))


def _ints(values: list[int]):
    from onnxscript import opset20 as op

    return op.Constant(value_ints=values)
