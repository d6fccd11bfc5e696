"""Convs that the compiled kernels compute in another form: an engine.

- 1-d convs are 2-d ones of one row.
- Maps of half precision are computed with in float32, and added up in it; banks of half precision are read as they are.
- Channels last, in training, are turned round: the kernels' gradients are of channels first.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from dyconvert.nn import native, native_library, tiles
from dyconvert.nn.mixture import Mixing
from dyconvert.nn.operands import Geometry, Gradients, Needs, Operands
from dyconvert.torch_internals.operators import multiplies_bfloat16

_HALF = (torch.float16, torch.bfloat16)
# From this many pixels in all the output's maps on, torch's convs are faster on a processor that multiplies bfloat16,
# although their kernels are mixed first: on Zen 4, 1.2 to 2.6 times. With fewer, ours are 1.5 to 7 times as fast.
_PIXELS = 512


def takes(operands: Operands, *, backward: bool) -> bool:
    """Whether this is for a conv that the kernels don't know as it is.

    Args:
        backward: whether one may follow.
    """
    x, weight, _, mixing, geometry, _ = operands
    if not x.is_cpu or x.dim() not in (3, 4) or weight.dim() != x.dim():
        return False
    if native_library.library() is None or mixing.factors is not None:
        return False
    if x.dtype in _HALF:
        return weight.dtype == x.dtype and not (x.dtype is torch.bfloat16 and _is_torchs(x, geometry))
    if weight.dtype not in native.BANKS.get(x.dtype, ()):
        return False
    if x.dim() == 3:
        return True
    # 1 x 1 convs with channels last are matmuls, which tiles do as they lie.
    return backward and tiles.is_channels_last(x) and weight.shape[2:].numel() > 1


def _is_torchs(x: Tensor, geometry: Geometry) -> bool:
    """Whether torch's own convs multiply bfloat16 so much faster that kernels may be mixed for them.

    What is mixed is used for all pixels: on few of them mixing, which they leave to matmuls, is what takes the time.
    """
    if not multiplies_bfloat16():
        return False
    pixels = x.shape[0]
    for length, stride in zip(x.shape[2:], geometry.stride, strict=True):
        pixels *= -(-length // stride)
    return pixels >= _PIXELS


def forward(operands: Operands, how: bool) -> Tensor:
    """A dynamic conv without autograd.

    Args:
        how: whether a backward may follow.
    """
    form = _Form.of(operands.x, operands.geometry, training=how)
    inner = form.operands(operands)
    call = native.prepare(inner)  # None: too large for the kernels
    return form.back(tiles.forward(inner) if call is None else native.forward(inner, call), operands.x)


def backward(grad: Tensor, operands: Operands, needs: Needs, how: bool) -> Gradients:
    """Those gradients that are needed; without autograd."""
    x, weight, _, mixing, geometry, _ = operands
    form = _Form.of(x, geometry, training=True)
    inner = form.operands(operands)
    call = native.prepare(inner)
    if call is None or not call.differentiable:
        gradients = tiles.backward(form.maps(grad), inner, needs)
    else:
        gradients = native.backward(form.maps(grad), inner, needs, call)
    grad_x, grad_bank, grad_eta, _ = gradients
    return Gradients(
        None if grad_x is None else form.back(grad_x, x),
        None if grad_bank is None else grad_bank.view(weight.shape).to(weight.dtype),
        None if grad_eta is None else grad_eta.to(mixing.coefficients.dtype),
        None,
    )


class _Form(NamedTuple):
    """In what form a conv is computed."""

    dtype: torch.dtype
    one_dim: bool
    training: bool
    geometry: Geometry

    @classmethod
    def of(cls, x: Tensor, geometry: Geometry, *, training: bool) -> "_Form":
        one_dim = x.dim() == 3
        if one_dim:
            (stride,), (dilation,) = geometry.stride, geometry.dilation
            (padding,) = cast(Sequence[int], geometry.padding)
            geometry = Geometry((1, stride), (0, padding), (1, dilation), geometry.groups)
        return cls(torch.float32 if x.dtype in _HALF else x.dtype, one_dim, training, geometry)

    def operands(self, operands: Operands) -> Operands:
        """The same conv in this form."""
        x, weight, bias, mixing, _, shift = operands
        coefficients = Mixing(self.vector(mixing.coefficients))
        return Operands(
            self.maps(x), self.bank(weight), self.vector(bias), coefficients, self.geometry, self.vector(shift)
        )

    def maps(self, x: Tensor) -> Tensor:
        """An input, or an output's gradient."""
        x = x.unsqueeze(2) if self.one_dim else x
        return x.to(self.dtype, memory_format=torch.contiguous_format if self.training else torch.preserve_format)

    def bank(self, weight: Tensor) -> Tensor:
        """The bank, of its own dtype: the kernels widen it."""
        if self.training:
            weight = weight.contiguous().to(self.dtype)
        return weight.unsqueeze(2) if self.one_dim else weight

    def vector(self, vector: Tensor | None) -> Tensor | None:
        """Coefficients, a bias or a shift."""
        return None if vector is None else vector.to(self.dtype)

    def back(self, out: Tensor, like: Tensor) -> Tensor:
        """An output, or an input's gradient, in the form of the conv that was asked for."""
        # In place: autograd forbids to write into an output that is a view, as an activation in place would.
        out = (out.squeeze_(2) if self.one_dim else out).to(like.dtype)
        return out.contiguous(memory_format=torch.channels_last) if tiles.is_channels_last(like) else out
