"""The compiled kernels, on convs of all shapes: where they aren't built, what takes their place."""

import random

import pytest
import torch
from test_kernels import compare, reference

from dyconvert.nn.dispatch import dynamic_conv


def draw(rng, *, dtype=torch.float64):
    """A conv of any shape that fits."""
    kernel = rng.choice([(1, 1), (3, 3), (3, 3), (3, 3), (5, 5), (1, 4), (7, 2)])
    stride, padding, dilation = (
        tuple(rng.choice(values) for _ in range(2)) for values in ((1, 1, 2, 3), (0, 1, 2), (1, 1, 2))
    )
    if rng.random() < 0.5:  # as most convs are
        stride, padding, dilation = (1, 1), tuple(k // 2 for k in kernel), (1, 1)
    groups, c_in, c_out = rng.choice([(1, 3, 5), (1, 40, 33), (1, 70, 24), (2, 60, 50), (11, 11, 22), (16, 16, 16)])
    reach = [d * (k - 1) + 1 - 2 * p for k, p, d in zip(kernel, padding, dilation, strict=True)]
    size = [rng.randint(max(least, 1), max(least, 1) + 22) for least in reach]
    batch, g = rng.choice([1, 2, 3, 5, 9]), rng.choice([1, 3, 6])

    def values(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    generator = torch.Generator().manual_seed(rng.randrange(1000))
    x = values(batch, c_in, *size)
    weight = values(g * c_out, c_in // groups, *kernel)
    if rng.random() < 0.3:
        x = x.contiguous(memory_format=torch.channels_last)
    if rng.random() < 0.2:
        weight = weight.contiguous(memory_format=torch.channels_last)
    bias = values(g * c_out) if rng.random() < 0.3 else None
    coefficients = values(batch, g, rng.choice([1, c_out]))
    tensors = [t if t is None else t.requires_grad_() for t in (x, weight, bias, coefficients)]
    return tensors, (stride, padding, dilation, groups)


@pytest.mark.parametrize("seed", range(40))
def test_any_shape(seed):
    tensors, geometry = draw(random.Random(seed))
    compare(dynamic_conv(*tensors, *geometry), tensors, geometry)
    with torch.inference_mode():
        compare(dynamic_conv(*tensors, *geometry), tensors, geometry)


@pytest.mark.parametrize("per", ["layer", "channel"])
def test_a_map_too_large_to_lay_out_at_once(per):
    generator = torch.Generator().manual_seed(0)
    x, weight, eta = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((1, 128, 70, 66), (2 * 24, 128, 3, 3), (1, 2, 24 if per == "channel" else 1))
    )
    geometry = (1, 1), (1, 1), (1, 1), 1
    compare(dynamic_conv(x, weight, None, eta, *geometry), [x, weight, None, eta], geometry)


def test_float32_loses_little():
    """Winograd's filtering has larger numbers on its way: twice the error of torch's conv is what was measured, and
    four times leaves room for another machine's conv."""
    generator = torch.Generator().manual_seed(0)
    x, weight, eta = (
        torch.randn(shape, generator=generator) for shape in ((2, 64, 28, 28), (4 * 64, 64, 3, 3), (2, 4, 1))
    )
    geometry = (1, 1), (1, 1), (1, 1), 1
    exact = reference([x.double(), weight.double(), None, eta.double()], geometry)
    ours = dynamic_conv(x, weight, None, eta, *geometry).double() - exact
    theirs = reference([x, weight, None, eta], geometry).double() - exact
    assert ours.std() < 4 * theirs.std()
