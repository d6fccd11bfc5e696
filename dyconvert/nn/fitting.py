"""Whether a dynamic conv's arguments fit together: asked before any of them is computed with."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dyconvert.errors import ArgumentError
from dyconvert.nn.operands import Geometry, Operands


class Looks(NamedTuple):
    """The properties of a tensor that decide whether it fits; hashable, so that answers are cached."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout = torch.strided

    @classmethod
    def of(cls, tensor: Tensor | None) -> "Looks | None":
        return None if tensor is None else cls(tensor.shape, tensor.dtype, tensor.device, tensor.layout)


def check(operands: Operands) -> None:
    """Refuse a dynamic conv's operands that don't fit together, `nn.dynamic_conv` says how they should.

    Sizes that are only known as symbols, as while a program is exported, are believed.

    Raises:
        ArgumentError: which argument doesn't fit, and what would.
    """
    x, weight, bias, mixing, geometry, shift = operands
    looks = [Looks.of(tensor) for tensor in (x, weight, bias, *mixing)]
    try:
        check_looks(*looks, numbered(geometry), Looks.of(shift))
    except TypeError as error:
        if "unhashable" not in str(error):
            raise  # symbols can't be hashed


def numbered(geometry: Geometry) -> Geometry:
    """The geometry with tuples in place of other sequences, so that it can be hashed."""
    stride, padding, dilation, groups = geometry
    try:
        return Geometry(tuple(stride), padding if isinstance(padding, str) else tuple(padding), tuple(dilation), groups)
    except TypeError:
        raise ArgumentError(
            f"stride, padding and dilation have a number for each of the input's dimensions, as in (1, 1). "
            f"They are {stride}, {padding} and {dilation}."
        ) from None


@functools.lru_cache(maxsize=1024)
def check_looks(
    x: Looks,
    weight: Looks,
    bias: Looks | None,
    coefficients: Looks,
    factors: Looks | None,
    geometry: Geometry,
    shift: Looks | None,
) -> None:
    """:func:`check`, given how the tensors look."""
    g = _check_shapes(x.shape, weight.shape, coefficients.shape, geometry.groups)
    channels = weight.shape[0] // g
    for name, vector, length, meaning in (
        ("bias", bias, weight.shape[0], "g * C_out"),
        ("shift", shift, channels, "C_out"),
    ):
        if vector is not None and vector.shape != (length,):
            raise ArgumentError(f"{name} has the shape {_text(vector)}. It must be [{meaning}], here [{length}].")
    if factors is not None:
        shapes = [(x.shape[0], groups, *weight.shape[1:]) for groups in (geometry.groups, 1)]
        if factors.shape not in shapes:
            raise ArgumentError(
                f"The kernels' factors have the shape {_text(factors)}. They must be [N, groups or 1, C_in / groups, "
                f"*kernel], here {list(shapes[0])}."
            )
    _check_geometry(x.shape, weight.shape, geometry)
    mixed_by = (("coefficients", coefficients), ("factors", factors))
    for name, tensor in (("the input", x), ("weight", weight), ("bias", bias), *mixed_by, ("shift", shift)):
        if tensor is None:
            continue
        if tensor.layout is not torch.strided:
            raise ArgumentError(f"{name} is of the layout {tensor.layout}. Make it dense: .to_dense().")
        if tensor.device != x.device:
            raise ArgumentError(
                f"{name} is on {tensor.device}, and the input on {x.device}. Move the model or the input: .to(device)."
            )
        if not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
            raise ArgumentError(f"{name} is of {tensor.dtype}. A dynamic conv computes with floating-point numbers.")
    if weight.dtype != x.dtype and not (weight.dtype in _HALF and x.dtype in (torch.float32, torch.float64)):
        raise ArgumentError(
            f"The bank is of {weight.dtype}, and the input of {x.dtype}. They must be the same, or the bank of half "
            "precision: convert the input, x.to(weight.dtype)."
        )
    if bias is not None and bias.dtype not in (weight.dtype, x.dtype):
        raise ArgumentError(f"The bias is of {bias.dtype}, and the bank of {weight.dtype}. They must be the same.")
    for name, tensor in mixed_by:
        if tensor is not None and tensor.dtype != x.dtype:
            raise ArgumentError(
                f"{name} are of {tensor.dtype}, and the input of {x.dtype}. Convert one of them: {name}.to(x.dtype)."
            )


def check_transposed(x: Tensor, weight: Tensor, bias: Tensor | None, coefficients: Tensor, groups: int) -> None:
    """Refuse a transposed dynamic conv's arguments of shapes that don't fit together; torch asks for the rest.

    Raises:
        ArgumentError: which argument doesn't fit, and what would.
    """
    if x.dim() not in (3, 4, 5) or weight.dim() != x.dim():
        raise ArgumentError(
            f"The input has the shape {list(x.shape)} and the bank {list(weight.shape)}. They must be [N, C_in, "
            "*spatial] and [g * C_in, C_out / groups, *kernel], with one to three spatial dimensions, as many in both."
        )
    g = _experts(x.shape[0], weight.shape[0], coefficients.shape)
    channels = weight.shape[1] * groups
    if weight.shape[0] != g * x.shape[1]:
        raise ArgumentError(f"The input has {x.shape[1]} channels, and the bank is for {weight.shape[0] // g}.")
    _check_per(coefficients.shape[2], channels)
    if bias is not None and bias.shape != (g * channels,):
        raise ArgumentError(f"bias has the shape {list(bias.shape)}. It must be [g * C_out], here [{g * channels}].")


_HALF = (torch.float16, torch.bfloat16)


def _check_shapes(x: Sequence[int], weight: Sequence[int], coefficients: Sequence[int], groups: int) -> int:
    """Returns g."""
    if len(x) not in (3, 4, 5) or len(weight) != len(x):
        raise ArgumentError(
            f"The input has the shape {list(x)} and the bank {list(weight)}. They must be [N, C_in, *spatial] and "
            "[g * C_out, C_in / groups, *kernel], with one to three spatial dimensions, as many in both."
        )
    g = _experts(x[0], weight[0], coefficients)
    channels = weight[0] // g
    _check_per(coefficients[2], channels)
    if not _is_number(groups, 1):
        raise ArgumentError(f"groups must be a number from 1 on. It is {groups!r}.")
    if weight[1] * groups != x[1]:
        raise ArgumentError(
            f"The input has {x[1]} channels, and the bank is for {weight[1] * groups}: {weight[1]} for each of "
            f"{groups} groups."
        )
    if channels % groups:
        raise ArgumentError(f"{channels} output channels can't be shared by {groups} groups evenly.")
    return g


def _experts(batch: int, rows: int, coefficients: Sequence[int]) -> int:
    """g, of coefficients that fit an input of `batch` images and a bank of `rows`."""
    if len(coefficients) != 3:
        raise ArgumentError(
            f"coefficients have the shape {list(coefficients)}. They must be [N, g, 1] or [N, g, C_out]."
        )
    images, g, _ = coefficients
    if images != batch:
        raise ArgumentError(
            f"There are coefficients of {images} images, and {batch} images in the input. A conv whose input has "
            "another batch than the predictor's needs a predictor of its own: plan.unshare(conv), or scope='layer'."
        )
    if g < 1 or rows < g or rows % g:
        raise ArgumentError(
            f"There are coefficients of {g} experts, which a bank of {rows} rows, [g * C_out, ...], doesn't have."
        )
    return g


def _check_per(per: int, channels: int) -> None:
    if per not in (1, channels):
        raise ArgumentError(
            f"There are {per} coefficients per expert. There must be one, or one for each of {channels} output "
            "channels."
        )


def _check_geometry(x: Sequence[int], weight: Sequence[int], geometry: Geometry) -> None:
    dims = len(x) - 2
    padding = geometry.padding
    for name, values, least in (
        ("stride", geometry.stride, 1),
        ("padding", padding, 0),
        ("dilation", geometry.dilation, 1),
    ):
        if isinstance(values, str):
            if values not in ("same", "valid"):
                raise ArgumentError(f"padding {values!r} isn't known. Give numbers, 'same' or 'valid'.")
        elif len(values) != dims or not all(_is_number(value, least) for value in values):
            raise ArgumentError(f"{name} must be {dims} whole numbers from {least} on. It is {values}.")
    if padding == "same" and any(step != 1 for step in geometry.stride):
        raise ArgumentError(f"padding='same' needs a stride of 1. It is {geometry.stride}.")
    if 0 in weight[1:] or 0 in x[1:]:  # no images at all are fine
        raise ArgumentError(f"The bank, {list(weight)}, or an image, {list(x[1:])}, is empty.")
    for dim, (length, kernel, step) in enumerate(zip(x[2:], weight[2:], geometry.dilation, strict=True)):
        reach = step * (kernel - 1) + 1
        numbers = (0,) * dims if isinstance(padding, str) else padding
        padded = length + (reach - 1 if padding == "same" else 2 * numbers[dim])
        if padded < reach:
            raise ArgumentError(
                f"A kernel that reaches over {reach} pixels is larger than the padded input, {padded} pixels. "
                "Take larger images, or leave this conv static: exclude it."
            )


def _is_number(value: Any, least: int) -> bool:
    return hasattr(value, "__index__") and least <= value < 2**31


def _text(tensor: Looks) -> list[int]:
    return list(tensor.shape)
