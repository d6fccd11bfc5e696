"""ODConv, and any other mixture along four axes: experts, output channels, input channels and kernel positions."""

import random
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from nets import FlatNet, ResidualNet, image, seeded
from test_native import PRODUCTS, SHAPES, TARGETS, chosen, draw, on
from torch import Tensor, nn

import dyconvert
from dyconvert import Method
from dyconvert.errors import ArgumentError, PlanError
from dyconvert.methods import AXES, get_method
from dyconvert.nn import CoefficientPredictor, DynamicConv, native, native_library
from dyconvert.nn.convs import DynamicConv2d
from dyconvert.nn.dispatch import dynamic_conv, force
from dyconvert.nn.mixture import Mixing, Mixture, Sizes
from dyconvert.nn.native_library import Kernel, Task
from dyconvert.nn.operands import Geometry, Operands
from dyconvert.nn.running import STRATEGIES
from dyconvert.nn.transposed import dynamic_conv_transpose

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
# Rounding alone, in float64.
EXACT = 1e-12


def mixture_for(x: Tensor, g: int, per: int, c_out: int, taps: int, axes: tuple[str, ...] = AXES) -> Mixture:
    """Random coefficients, and factors along some of the axes."""
    generator = torch.Generator().manual_seed(7)
    sizes = {"outputs": c_out, "inputs": x.shape[1], "positions": taps}

    def values(*shape: int) -> Tensor:
        return torch.rand(len(x), *shape, generator=generator, dtype=x.dtype)

    factors = {axis: values(count) for axis, count in sizes.items() if axis in axes}
    return Mixture(values(g, per), **factors).map(Tensor.requires_grad_)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, mixture: Mixture, geometry: tuple) -> Tensor:
    """ODConv's equation 3, image by image, as the paper has it: the input and the output are multiplied."""
    dims, g = x.dim() - 2, mixture.experts.shape[1]
    outputs = []
    for n in range(len(x)):
        eta = mixture.experts[n].expand(g, weight.shape[0] // g)
        kernel = torch.einsum("gt,gt...->t...", eta, weight.unflatten(0, (g, -1)))
        own, given = None if bias is None else (eta * bias.view(g, -1)).sum(0), x[n : n + 1]
        if mixture.positions is not None:
            kernel = kernel * mixture.positions[n].view(weight.shape[2:])
        if mixture.inputs is not None:
            given = given * mixture.inputs[n].view(-1, *[1] * dims)
        out = CONV[dims](given, kernel, own, *geometry)
        outputs.append(out if mixture.outputs is None else out * mixture.outputs[n].view(-1, *[1] * dims))
    return torch.cat(outputs)


def compare(x: Tensor, weight: Tensor, bias: Tensor | None, mixture: Mixture, geometry: tuple) -> None:
    """Outputs and all gradients against the reference."""
    expected = reference(x, weight, bias, mixture, geometry)
    with torch.inference_mode():
        torch.testing.assert_close(dynamic_conv(x, weight, bias, mixture, *geometry), expected, atol=1e-11, rtol=0)
    out = dynamic_conv(x, weight, bias, mixture, *geometry)
    leaves = [x, weight, *([] if bias is None else [bias]), *mixture.axes().values()]
    grad = torch.randn_like(expected)
    for found, right in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        assert (found - right).abs().max() <= EXACT * right.abs().max().clamp(min=1)


# ---- Computing ----


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", range(12))
def test_any_shape(seed: int, target: str | None) -> None:
    rng = random.Random(seed)
    (x, weight, bias, eta), geometry = draw(rng)
    g, c_out = eta.shape[1], len(weight) // eta.shape[1]
    axes = [axis for axis in AXES if rng.random() < 0.7]
    mixture = mixture_for(x.detach(), g, eta.shape[2], c_out, weight.shape[2:].numel(), axes)
    with on(target):
        compare(x, weight, bias, mixture, geometry)


@pytest.mark.skipif(native_library.library() is None, reason="the compiled kernels aren't built")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", Kernel)
def test_each_compiled_kernel(kernel: Kernel, target: str) -> None:
    size, bank, stride, padding, groups = SHAPES[kernel]
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in (size, (3 * bank[0], *bank[1:]))
    )
    if kernel == Kernel.DEPTHWISE_LAST:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    mixture = mixture_for(x.detach(), 3, 1, bank[0], weight.shape[2:].numel())
    geometry = Geometry((stride,) * 2, (padding,) * 2, (1, 1), groups)
    with on(target):
        call = native.prepare(Operands(x, weight, None, Mixing.of(mixture, weight.shape, groups), geometry))
        task = Task.BANK_GRADIENT if kernel in PRODUCTS else Task.OUTPUT
        assert call.kernel(task, x.dtype) == chosen(kernel, target)
        compare(x, weight, None, mixture, geometry)


@pytest.mark.parametrize("strategy", [*STRATEGIES, None])
@pytest.mark.parametrize(("dims", "groups", "last"), [(1, 2, False), (2, 1, True), (2, 8, False), (3, 1, False)])
def test_strategies_agree(strategy: str | None, dims: int, groups: int, last: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 8, *[5] * dims, dtype=torch.float64)
    weight = torch.randn(2 * 8, 8 // groups, *[3] * dims, dtype=torch.float64)
    if last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    bias = torch.randn(2 * 8, dtype=torch.float64).requires_grad_()
    geometry = ([1] * dims, [1] * dims, [1] * dims, groups)
    with force(strategy):
        compare(x.requires_grad_(), weight.requires_grad_(), bias, mixture_for(x.detach(), 2, 1, 8, 3**dims), geometry)


def test_gradients_by_differences_and_a_second_time() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 2, 3, 2).double().requires_grad_(), torch.randn(2 * 2, 1, 2, 2).double().requires_grad_()
    axes = mixture_for(x.detach(), 2, 1, 2, 4)

    def conv(x: Tensor, weight: Tensor, *axes: Tensor) -> Tensor:
        return dynamic_conv(x, weight, None, Mixture(*axes), (1, 1), (1, 1), (1, 1), 2)

    assert torch.autograd.gradcheck(conv, (x, weight, *axes))
    assert torch.autograd.gradgradcheck(conv, (x, weight, *axes))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed(dims: int) -> None:
    torch.manual_seed(0)
    g, groups, kernel = 2, 2, [3] * dims
    x = torch.randn(3, 6, *[4] * dims).double()
    weight = torch.randn(g * 6, 4, *kernel).double()
    mixture = mixture_for(x, g, 1, 8, 3**dims)
    geometry = [2] * dims, [1] * dims, [1] * dims, groups, [1] * dims
    out = dynamic_conv_transpose(x, weight, None, mixture, *geometry)
    for n in range(3):
        mixed = (mixture.experts[n].view(g, *[1] * (dims + 2)) * weight.unflatten(0, (g, -1))).sum(0)
        mixed = mixed * mixture.positions[n].view(kernel)
        given = x[n : n + 1] * mixture.inputs[n].view(-1, *[1] * dims)
        right = TRANSPOSED[dims](given, mixed, None, *geometry) * mixture.outputs[n].view(-1, *[1] * dims)
        torch.testing.assert_close(out[n : n + 1], right, atol=1e-11, rtol=0)


@pytest.mark.parametrize(("axis", "says"), [("outputs", r"\[N, C_out\]"), ("inputs", "C_in"), ("positions", "taps")])
def test_factors_that_do_not_fit(axis: str, says: str) -> None:
    mixture = Mixture(torch.ones(2, 3, 1), **{axis: torch.ones(2, 7)})
    with pytest.raises(ArgumentError, match=says):
        DynamicConv2d(4, 6, 3, g=3)(torch.zeros(2, 4, 5, 5), mixture)


# ---- The predictor ----


def test_the_predictor_follows_the_equations() -> None:
    torch.manual_seed(0)
    conv = DynamicConv2d(32, 24, 3, method="odconv", dtype=torch.float64)
    predictor = conv.coefficient_predictor
    assert predictor.hidden.out_features == 16  # 32 / 16 would be 2
    for parameter in predictor.parameters():
        nn.init.normal_(parameter)
    predictor.temperature.fill_(3.0)
    x = torch.randn(5, 32, 6, 6).double()
    found = predictor(x)[0]
    hidden = F.linear(x.mean((2, 3)), predictor.hidden.weight, predictor.hidden.bias)
    hidden = F.layer_norm(hidden, (16,), predictor.norm.weight, predictor.norm.bias).relu()
    logits = F.linear(hidden, predictor.linear.weight, predictor.linear.bias) / 3
    experts, outputs, inputs, positions = logits.split([4, 24, 32, 9], 1)
    torch.testing.assert_close(found.experts.squeeze(2), experts.softmax(1))
    for axis, logit in ((found.outputs, outputs), (found.inputs, inputs), (found.positions, positions)):
        torch.testing.assert_close(axis, 2 * logit.sigmoid())


@pytest.mark.parametrize(
    ("conv", "sizes"),
    [
        (nn.Conv2d(8, 12, 3), Sizes(4, 1, 12, 8, 9)),
        (nn.Conv2d(8, 12, 1), Sizes(4, 1, 12, 8, 0)),
        (nn.Conv2d(8, 8, 5, groups=8), Sizes(4, 1, 0, 8, 25)),
        (nn.Conv2d(8, 16, 3, groups=8), Sizes(4, 1, 16, 8, 9)),
        (nn.Conv1d(8, 12, 5), Sizes(4, 1, 12, 8, 5)),
        (nn.ConvTranspose3d(8, 12, 2), Sizes(4, 1, 12, 8, 8)),
    ],
)
def test_what_a_conv_is_given(conv: nn.Module, sizes: Sizes) -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 1) if isinstance(conv, nn.Conv1d) else type(conv)(3, 8, 1), nn.ReLU(), conv)
    x = torch.randn(2, 3, *[6] * (conv.weight.dim() - 2))
    dynamic = dyconvert.convert(model, method="odconv", example=x)
    assert dynamic[2].sizes == sizes
    assert dynamic[2].coefficient_predictor.linear.out_features == sizes.total


def test_a_conv_of_which_nothing_is_said_stays_static() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3))
    plan = dyconvert.plan(model, get_method("odconv", g=1, axes=("positions",)), example=image(1))
    assert [conv.name for conv in plan.converted] == ["4"]
    assert "positions" in plan["2"].reason


def test_a_step_with_one_image() -> None:
    model = dyconvert.convert(seeded(FlatNet), method="odconv").train()
    model(image(1)).sum().backward()
    predictors = [module for module in model.modules() if isinstance(module, CoefficientPredictor)]
    assert predictors
    assert all(predictor.linear.weight.grad.abs().max() > 0 for predictor in predictors)


# ---- Any axes ----


SUBSETS = [
    pytest.param(axes, marks=[pytest.mark.sweep] if count in (2, 3) else [], id="+".join(axes))
    for count in range(1, 5)
    for axes in combinations(AXES, count)
]


@pytest.mark.parametrize("axes", SUBSETS)
def test_any_axes_start_exact_and_collapse_where_they_are_constant(axes: tuple[str, ...]) -> None:
    g = 3 if "experts" in axes else 1
    method = Method(name="mine", g=g, activation="softmax", per="layer", axes=axes, scope="block")
    model = seeded(ResidualNet).double().eval()
    dynamic = dyconvert.convert(model, method=method)
    x = image(3, dtype=torch.float64)
    assert dyconvert.verify(model, dynamic, x).relative < EXACT
    predictors = [module for module in dynamic.modules() if isinstance(module, CoefficientPredictor)]
    for predictor in predictors:  # the same for all images, whatever they are
        nn.init.normal_(predictor.linear.bias)
    assert dyconvert.verify(model, dynamic, x).relative > 1e-3
    static = dyconvert.collapse(dynamic, [x])
    assert not any(isinstance(module, DynamicConv) for module in static.modules())
    assert dyconvert.verify(dynamic, static, x).relative < EXACT


def test_all_axes_beside_dynets_coefficients() -> None:
    method = dyconvert.METHODS["dynet"].model_copy(update={"axes": AXES, "name": "mine"})
    model = seeded(ResidualNet).double().eval()
    dynamic = dyconvert.convert(model, method=method)
    conv = dynamic.layer1[0].conv1
    assert conv.block_predictor.sizes[0] == Sizes(6, conv.out_channels, conv.out_channels, conv.in_channels, 9)
    assert dyconvert.verify(model, dynamic, image(2, dtype=torch.float64)).relative < EXACT


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"axes": ()}, "each once"),
        ({"axes": ("inputs", "inputs")}, "each once"),
        ({"axes": ("inputs",), "g": 2}, "need the axis 'experts'"),
        ({"axes": ("experts",), "g": 1}, "nothing would be dynamic"),
        ({"axes": ("rows",)}, "axes"),
    ],
)
def test_axes_that_make_no_sense(choices: dict, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        get_method("odconv", **choices)
