"""Convs that the compiled kernels compute in another form: 1-d, half precision, channels last in training."""

import pytest
import torch
from torch import Tensor

from dyconvert.nn import adapted, dynamic_conv, engines, native, native_library, strategies
from dyconvert.nn.mixture import Mixing
from dyconvert.nn.operands import Geometry, Operands

pytestmark = pytest.mark.skipif(native_library.library() is None, reason="there are no compiled kernels here")

# A half's rounding of maps and gradients, of sums in float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# kernel, stride, padding, dilation, groups, C_in, C_out, size
SHAPES = {
    "1d": ((3,), (1,), (1,), (1,), 1, 12, 20, (33,)),
    "1d strided": ((5,), (2,), (2,), (1,), 2, 12, 20, (40,)),
    "1d dilated": ((3,), (1,), (4,), (2,), 1, 12, 20, (33,)),
    "1d depthwise": ((7,), (1,), (3,), (1,), 12, 12, 12, (40,)),
    "1d pointwise": ((1,), (1,), (0,), (1,), 1, 12, 20, (19,)),
    "2d": ((3, 3), (1, 1), (1, 1), (1, 1), 1, 12, 20, (13, 14)),
    "2d strided": ((3, 3), (2, 2), (1, 1), (1, 1), 2, 12, 20, (13, 14)),
    "2d pointwise": ((1, 1), (1, 1), (0, 0), (1, 1), 1, 12, 20, (9, 7)),
    "2d depthwise": ((3, 3), (1, 1), (1, 1), (1, 1), 12, 12, 24, (13, 14)),
}


def arguments(name: str, dtype: torch.dtype, batch: int, per_channel: bool) -> tuple[list[Tensor], Geometry]:
    kernel, stride, padding, dilation, groups, c_in, c_out, size = SHAPES[name]
    generator = torch.Generator().manual_seed(batch)
    shapes = [(batch, c_in, *size), (3 * c_out, c_in // groups, *kernel), (3 * c_out,)]
    shapes.append((batch, 3, c_out if per_channel else 1))
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return values, Geometry(stride, padding, dilation, groups)


def close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return bool((found.double() - wanted).abs().max() <= tolerance * wanted.abs().max())


def check(tensors: list[Tensor], geometry: Geometry, tolerance: float) -> None:
    """Outputs and gradients, with those of plain operations in float64."""
    exact = [t.detach().double().requires_grad_() for t in tensors]
    x, weight, bias, eta = exact
    wanted = strategies.groups(Operands(x, weight, bias, Mixing(eta), geometry))
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted_gradients = torch.autograd.grad(wanted, exact, grad)
    x, weight, bias, eta = tensors
    with torch.no_grad():
        assert close(dynamic_conv(x, weight, bias, eta, *geometry), wanted, tolerance)
        shift = torch.ones(wanted.shape[1], dtype=x.dtype)
        shifted = dynamic_conv(x, weight, None, eta, *geometry, shift)
        assert close(shifted - dynamic_conv(x, weight, None, eta, *geometry), torch.ones_like(wanted), 10 * tolerance)
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = dynamic_conv(leaves[0], leaves[1], leaves[2], leaves[3], *geometry)
    assert out.dtype == x.dtype
    if x.dtype is torch.float32:  # torch's grouped convs of half precision don't keep it
        assert out.is_contiguous() == x.is_contiguous()
    for found, expected, leaf in zip(
        torch.autograd.grad(out, leaves, grad.to(x.dtype)), wanted_gradients, leaves, strict=True
    ):
        assert found.dtype == leaf.dtype
        assert close(found, expected, 2 * tolerance)


@pytest.mark.parametrize("per_channel", [False, True], ids=["layer", "channel"])
@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("1d")])
def test_one_dimension(name, per_channel):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for batch in (1, 3):
            check(*arguments(name, dtype, batch, per_channel), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("2d")])
def test_half_precision(name, dtype, monkeypatch):
    """By the kernels, and by what a processor that multiplies bfloat16 takes in their place."""
    for multiplies in (False, True):
        monkeypatch.setattr(adapted, "multiplies_bfloat16", lambda answer=multiplies: answer)
        for batch, per_channel in ((1, True), (5, False)):
            check(*arguments(name, dtype, batch, per_channel), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("2d")])
def test_training_with_channels_last(name, dtype):
    for last in ((True, False), (True, True)):
        (x, weight, bias, eta), geometry = arguments(name, dtype, 3, True)
        x, weight = (
            t.contiguous(memory_format=torch.channels_last) if turned else t
            for t, turned in zip((x, weight), last, strict=True)
        )
        check([x, weight, bias, eta], geometry, TOLERANCE[dtype])


def test_which_convs_are_for_it():
    def engine(name, dtype, *, backward=False, last=False, batch=3):
        (x, weight, _, eta), geometry = arguments(name, dtype, batch, True)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        return engines.by_rule(Operands(x, weight, None, Mixing(eta), geometry), backward=backward)[0]

    assert engine("1d", torch.float32) is adapted
    assert engine("1d", torch.float64, backward=True) is adapted
    assert engine("2d", torch.float16) is adapted
    assert engine("2d", torch.bfloat16, batch=1) is adapted
    assert engine("2d", torch.float32) is native
    assert engine("2d", torch.float32, last=True) is native
    assert engine("2d", torch.float32, last=True, backward=True) is adapted
    assert engine("2d pointwise", torch.float32, last=True, backward=True) is engines.tiles
    assert engine("2d pointwise", torch.float32, last=True) is engines.tiles


def test_under_autocast():
    (x, weight, bias, eta), geometry = arguments("2d", torch.float32, 2, True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = dynamic_conv(x, weight, bias, eta, *geometry)
    assert out.dtype == torch.bfloat16
    assert close(out, strategies.groups(Operands(x, weight, bias, Mixing(eta), geometry)).double(), 3e-2)


@pytest.mark.parametrize("name", SHAPES)
def test_an_output_that_is_written_in_place(name: str) -> None:
    """As an activation in place does: autograd forbids it for views."""
    (x, weight, _, eta), geometry = arguments(name, torch.float32, 2, False)
    leaves = [t.requires_grad_() for t in (x, weight, eta)]
    out = dynamic_conv(x, weight, None, eta, *geometry).relu_()
    ours = torch.autograd.grad(out.sum(), leaves)
    theirs = torch.autograd.grad(
        strategies.groups(Operands(x, weight, None, Mixing(eta), geometry)).relu().sum(), leaves
    )
    for found, known in zip(ours, theirs, strict=True):
        assert (found - known).abs().max() <= 1e-4 * known.abs().max()
