"""The ONNX nodes of a dynamic conv and of a compressed linear layer.

A dynamic conv becomes a few nodes: they mix the kernel, then follow one Conv, or patches and one MatMul.
"""

import math
from collections.abc import Sequence


def packed_linear_nodes(x, weight, scale=None, bias=None):
    """The ONNX nodes of a compressed linear layer."""
    from onnxscript import opset20 as op

    return op.Gemm(x, _widened(weight, scale, bias.dtype), bias, transB=1)


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
    """The ONNX nodes of one dynamic conv. The arguments are values of the graph, and the operator's constants."""
    batch = x.shape[0]
    bank = (bank, mean, scale, by_terms)
    # ONNX pads before every dimension, first to last, and then after.
    pads = [*padding[-2::-2], *padding[::-2]]
    geometry = (list(kernel_size), list(stride), pads, list(dilation), groups)
    if isinstance(batch, int):
        return _with_conv(x, bank, coefficients, factors, bias, out_channels, batch, geometry)
    return _with_matmul(x, bank, coefficients, factors, bias, out_channels, geometry)


def _mixed(bank, coefficients, factors, shape: list[int], by_group: list[int], images: int | None):
    """The mixed kernels of all images.

    Args:
        factors: `[N, groups or 1, 1, K]`.
        shape: the shape of the result.
        by_group: the shape in which factors multiply kernels, `[N, groups, C_out / groups, K]`.
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
        # The experts' mean, times the sum of the coefficients.
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
    """Rows of int8 or bfloat16, converted to the dtype that the graph computes in."""
    from onnxscript import opset20 as op

    return op.Cast(rows, to=int(dtype)) if scale is None else op.DequantizeLinear(rows, scale, axis=0)


def _with_conv(x, bank, coefficients, factors, bias, out_channels: int, batch: int, geometry: tuple):
    """For a fixed batch: one Conv, whose groups are the images."""
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
    """For any batch: one MatMul of the kernels with the input's patches, [N, groups, taps C_in / groups, L]."""
    from onnxscript import opset20 as op

    kernel_size, stride, padding, dilation, groups = geometry
    dims = len(kernel_size)
    per_group = x.shape[1] // groups
    size = _out_size(_known(x.shape[2:]), geometry)
    pixels = -1 if size is None else math.prod(size)  # with -1, an empty batch has no size
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
    """The spatial size of a conv's output; None if that of its input isn't known."""
    if size is None:
        return None
    kernel_size, stride, padding, dilation, _ = geometry
    dims = range(len(size))
    return [
        (size[d] + padding[d] + padding[len(size) + d] - dilation[d] * (kernel_size[d] - 1) - 1) // stride[d] + 1
        for d in dims
    ]


def _reshape(value, start: list[int], like, known: list[int] | None):
    """Reshape to `[*start, *spatial]`, with the spatial size of `like`: `known`, or computed when the graph runs."""
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
