"""The compiled kernels, on convs of all shapes: where they aren't built, what takes their place."""

import os
import random
import subprocess
import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch
from test_kernels import compare, reference

from dyconvert.nn import native, native_library
from dyconvert.nn.dispatch import dynamic_conv
from dyconvert.nn.mixture import Mixing
from dyconvert.nn.native_library import Kernel, Task
from dyconvert.nn.operands import Geometry, Operands


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


TARGETS = native_library.targets() or [None]


@contextmanager
def on(target):
    """With the kernels for an instruction set; None: without compiled kernels."""
    with nullcontext() if target is None else native_library.using(target):
        yield


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", range(25))
def test_any_shape(seed, target):
    tensors, geometry = draw(random.Random(seed))
    with on(target):
        compare(dynamic_conv(*tensors, *geometry), tensors, geometry)
        with torch.inference_mode():
            compare(dynamic_conv(*tensors, *geometry), tensors, geometry)


# Of each kernel: the input, the bank without its experts, and how the conv walks (stride, padding, groups).
SHAPES = {
    Kernel.WINOGRAD: ((2, 24, 40, 38), (16, 24, 3, 3), 1, 1, 1),
    Kernel.PANELS: ((2, 70, 9, 11), (33, 70, 1, 1), 1, 0, 1),
    Kernel.PLANES: ((3, 6, 9, 9), (8, 3, 5, 5), 2, 2, 2),
    Kernel.DEPTHWISE: ((2, 9, 13, 10), (18, 1, 3, 3), 1, 1, 9),
    Kernel.DEPTHWISE_LAST: ((2, 40, 13, 10), (40, 1, 5, 5), 1, 2, 40),
    Kernel.TILE_PRODUCTS: ((2, 24, 40, 38), (16, 24, 3, 3), 1, 1, 1),
    Kernel.PIXEL_PRODUCTS: ((2, 12, 20, 18), (8, 12, 3, 3), 2, 1, 1),
    Kernel.DEPTHWISE_PRODUCTS: ((2, 9, 13, 10), (18, 1, 3, 3), 1, 1, 9),
    Kernel.CHANNELS: ((8, 20, 5, 5), (45, 20, 3, 3), 1, 1, 1),
}
PRODUCTS = (Kernel.TILE_PRODUCTS, Kernel.PIXEL_PRODUCTS, Kernel.DEPTHWISE_PRODUCTS)


def chosen(kernel: Kernel, target: str) -> Kernel:
    """Which kernel computes the shape of `kernel` on a target: some are chosen for vectors of 64 bytes only."""
    wide = target.startswith("avx512")
    return Kernel.PLANES if kernel == Kernel.CHANNELS and not wide else kernel


@pytest.mark.skipif(native_library.library() is None, reason="the compiled kernels aren't built")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", Kernel)
def test_each_kernel(kernel, dtype, target):
    """Which one computes a shape is known, and each computes it rightly."""
    size, bank, stride, padding, groups = SHAPES[kernel]
    g = 3
    generator = torch.Generator().manual_seed(0)
    x, weight, eta = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in (size, (g * bank[0], *bank[1:]), (size[0], g, bank[0]))
    )
    if kernel == Kernel.DEPTHWISE_LAST:
        x = x.contiguous(memory_format=torch.channels_last)
    geometry = Geometry((stride,) * 2, (padding,) * 2, (1, 1), groups)
    with on(target):
        call = native.prepare(Operands(x, weight, None, Mixing(eta), geometry))
        asked = [Task.BANK_GRADIENT] if kernel in PRODUCTS else [Task.OUTPUT]
        assert call.kernel(asked[0], dtype) == chosen(kernel, target)
        tensors = [t if t is None else t.requires_grad_(kernel in PRODUCTS) for t in (x, weight, None, eta)]
        found = dynamic_conv(*tensors, *geometry)
        if dtype == torch.float64:
            return compare(found, tensors, geometry)
        exact = [t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
        expected = reference(exact, geometry)
        # Winograd's filtering has an error of four times float32's at most, as below; sums of a hundred products.
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        if kernel in PRODUCTS:
            grad = torch.randn(found.shape, generator=generator)
            wanted = [t for t in tensors if t is not None]
            ours = torch.autograd.grad(found, wanted, grad)
            theirs = torch.autograd.grad(expected, [t for t in exact if t is not None], grad.double())
            for our, their in zip(ours, theirs, strict=True):
                torch.testing.assert_close(our.double(), their, rtol=1e-3, atol=1e-3)


# Of maps on which vectors of output channels are the faster way: the batch, groups and channels, then the map, the
# kernel, padding and dilation.
SMALL_MAPS = {
    "7 x 7": (9, 1, 24, 40, (7, 7), (3, 3), (1, 1), (1, 1)),
    "one image": (1, 1, 24, 128, (7, 7), (3, 3), (1, 1), (1, 1)),
    "not square": (3, 1, 17, 16, (4, 9), (3, 3), (1, 1), (1, 1)),
    "no padding": (2, 1, 16, 40, (7, 7), (3, 3), (0, 0), (1, 1)),
    "more padding than the kernel reaches": (2, 1, 16, 40, (4, 5), (3, 3), (3, 2), (1, 1)),
    "two pixels of padding": (2, 1, 16, 40, (7, 7), (5, 5), (2, 2), (1, 1)),
    "dilation": (2, 1, 16, 40, (8, 7), (3, 3), (2, 2), (2, 2)),
    "a row of taps": (2, 1, 16, 40, (5, 6), (1, 3), (0, 1), (1, 1)),
    "groups": (3, 2, 36, 32, (6, 6), (3, 3), (1, 1), (1, 1)),
    "several parts": (5, 1, 1300, 8, (5, 5), (3, 3), (1, 1), (1, 1)),
    "planes of 256 bytes": (2, 1, 16, 40, (6, 6), (3, 3), (1, 1), (1, 1)),
}


@pytest.mark.skipif(native_library.library() is None, reason="the compiled kernels aren't built")
@pytest.mark.parametrize("target", [target for target in TARGETS if target and target.startswith("avx512")])
@pytest.mark.parametrize("last", ["", "input", "bank"])
@pytest.mark.parametrize("name", SMALL_MAPS)
def test_output_channels_in_vectors(name, last, target):
    batch, groups, c_in, c_out, size, kernel, padding, dilation = SMALL_MAPS[name]
    g = 2
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, eta = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (
            (batch, c_in, *size),
            (g * c_out, c_in // groups, *kernel),
            (g * c_out,),
            (batch, g, c_out if batch % 2 else 1),
        )
    )
    if last == "input":
        x = x.contiguous(memory_format=torch.channels_last)
    elif last == "bank":
        weight = weight.contiguous(memory_format=torch.channels_last)
    geometry = Geometry((1, 1), padding, dilation, groups)
    with on(target), torch.inference_mode():
        call = native.prepare(Operands(x, weight, bias, Mixing(eta), geometry))
        assert call.kernel(Task.OUTPUT, torch.float64) == Kernel.CHANNELS
        found = native.forward(Operands(x, weight, bias, Mixing(eta), geometry), call)
        compare(found, [x, weight, bias, eta], geometry)


@pytest.mark.skipif(
    native_library.library() is None, reason="without compiled kernels a bank is mixed in its own precision"
)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", [kernel for kernel in SHAPES if kernel not in PRODUCTS])
def test_banks_of_half_precision(kernel, half, target):
    size, bank, stride, padding, groups = SHAPES[kernel]
    generator = torch.Generator().manual_seed(0)
    x, weight, eta = (
        torch.randn(shape, generator=generator) for shape in (size, (2 * bank[0], *bank[1:]), (size[0], 2, 1))
    )
    weight = weight.to(half)
    weight.view(-1)[:3] = torch.tensor([0.0, -6e-8, 1e-40]).to(half)  # the smallest, which are written otherwise
    geometry = (stride,) * 2, (padding,) * 2, (1, 1), groups
    with on(target), torch.inference_mode():
        found = dynamic_conv(x, weight, None, eta, *geometry)
        expected = dynamic_conv(x, weight.float(), None, eta, *geometry)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(native_library.library() is None, reason="the compiled kernels aren't built")
def test_an_instruction_set_by_the_environment():
    code = "from dyconvert.nn import native_library; print(native_library.target())"
    assert run_python(code, DYCONVERT_CPU=TARGETS[-1]).stdout.strip() == TARGETS[-1]
    refused = run_python(code, DYCONVERT_CPU="z80")
    assert refused.returncode
    assert f"It can use {', '.join(TARGETS)}" in refused.stderr


def test_kernels_that_are_required_and_missing():
    code = (
        "from pathlib import Path; from dyconvert.nn import native_library; "
        "native_library.LIBRARY = Path('nowhere.so'); print(native_library.library())"
    )
    assert run_python(code, DYCONVERT_NATIVE="").stdout.strip() == "None"
    assert "DYCONVERT_NATIVE=1 asks for the compiled kernels" in run_python(code, DYCONVERT_NATIVE="1").stderr


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
