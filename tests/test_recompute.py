"""The plain engine, which mixes kernels again for backward on every device: any dtype, a few images at a time."""

import pytest
import torch
from test_kernels import CASES, arguments, compare

from dyconvert.nn import recompute
from dyconvert.nn.dispatch import dynamic_conv, force


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", ["recompute_groups", "recompute_unfold"])
def test_a_few_images_at_a_time_agree(strategy, case, per, monkeypatch):
    tensors, geometry = arguments(case, 5, per)
    x, weight = tensors[:2]
    for images in (0, 2):  # one at a time at least, where not even one fits
        monkeypatch.setattr(recompute, "_BYTES", images * 2 * 8 * (weight.numel() // 3 + 9 * x[0].numel()))
        with force(strategy):
            compare(dynamic_conv(*tensors, *geometry), tensors, geometry)
            with torch.no_grad():
                compare(dynamic_conv(*tensors, *geometry), tensors, geometry)


@pytest.mark.parametrize("frozen", [0, 1, 3])
@pytest.mark.parametrize("strategy", ["recompute_groups", "recompute_unfold"])
def test_what_needs_no_gradient_gets_none(strategy, frozen):
    tensors, geometry = arguments("groups")
    tensors[frozen].requires_grad_(False)
    with force(strategy):
        out = dynamic_conv(*tensors, *geometry)
    wanted = [t for t in tensors if t.requires_grad]
    got = torch.autograd.grad(out.sum(), wanted)
    with force("groups"):
        right = torch.autograd.grad(dynamic_conv(*tensors, *geometry).sum(), wanted)
    torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [1, 3])
def test_half_precision_keeps_no_kernels_either(kernel, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (16, 64, 4, 4), (3 * 64, 64, kernel, kernel), (16, 3, 1)
    x, weight, eta = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    saved = []
    geometry = (1, 1), (kernel // 2,) * 2, (1, 1), 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        out = dynamic_conv(x, weight, None, eta, *geometry)
    assert sum(saved) == x.numel() + weight.numel() + eta.numel()
    exact = [t.detach().double().requires_grad_() for t in (x, weight, eta)]
    right = dynamic_conv(exact[0], exact[1], None, exact[2], *geometry)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad(out, (x, weight, eta), grad.to(dtype))
    theirs = torch.autograd.grad(right, exact, grad.to(dtype).double())
    for found, wanted in zip((out, *ours), (right, *theirs), strict=True):
        # Kernels, and their gradients, are rounded to `dtype` once before they are summed: a few of its steps.
        assert (found.double() - wanted).abs().max() < 4 * torch.finfo(dtype).eps * wanted.abs().max()


def test_the_banks_gradient_is_added_up_in_single_precision(monkeypatch):
    """256 equal images: added up in bfloat16 one by one, the sum would stop growing at 256 times their first bit."""
    monkeypatch.setattr(recompute, "_BYTES", 0)
    x = torch.ones(300, 1, 1, 1, dtype=torch.bfloat16)
    weight = torch.ones(2, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    eta = torch.ones(300, 2, 1, dtype=torch.bfloat16)
    with force("recompute_groups"):
        out = dynamic_conv(x, weight, None, eta, (1, 1), (0, 0), (1, 1), 1)
    out.backward(torch.ones_like(out))
    assert weight.grad.flatten().tolist() == [300, 300]
