"""A converted model computes what the original did, and isn't stuck."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torchvision.models.resnet import BasicBlock, ResNet

import dyconvert

METHODS = tuple(dyconvert.METHODS)

# float64: rounding alone, 1e-15 in eval; batch statistics over small maps amplify it by up to a million.
# float32: nine digits fewer.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

FAMILIES = (
    "resnet18",
    "resnext50_32x4d",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "densenet121",
    "googlenet",
    "squeezenet1_1",
    "shufflenet_v2_x0_5",
    "regnet_y_400mf",
    "efficientnet_b0",
    "convnext_tiny",
    "alexnet",
    "mnasnet0_5",
    "lraspp_mobilenet_v3_large",
    "quantized_resnet18",
    "r2plus1d_18",
)


def every_family() -> Iterator[Any]:
    """All families with the first method; by default a quarter of them with each other one."""
    for index, name in enumerate(FAMILIES):
        for place, method in enumerate(METHODS):
            default = place == 0 or index % 4 == place
            yield pytest.param(name, method, marks=() if default else pytest.mark.sweep)


def relative_difference(a: object, b: object) -> float:
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return max(((x - y).abs().max() / x.abs().max()).item() for x, y in pairs if isinstance(x, torch.Tensor))


def check_equal(name: str, method: str, dtype: torch.dtype, batches: tuple[int, ...], training: bool) -> dyconvert.Plan:
    model = zoo.build(name).to(dtype)
    plan = dyconvert.plan(model, method, example=zoo.images(name, 1, dtype))
    dynamic = dyconvert.convert(model, plan)
    for batch in batches:
        assert dyconvert.verify(model, dynamic, zoo.images(name, batch, dtype)).relative < TOLERANCE[dtype]
    if training:
        images = zoo.images(name, 5, dtype)
        with torch.no_grad():
            assert relative_difference(model.train()(images), dynamic.train()(images)) < TOLERANCE[dtype]
    return plan


@pytest.mark.parametrize(("name", "method"), list(every_family()))
def test_outputs_are_the_same(name: str, method: str) -> None:
    plan = check_equal(name, method, torch.float64, (2,), training=True)
    assert {conv.name for conv in plan.convs} == {
        n for n, m in zoo.build(name).named_modules() if isinstance(m, nn.modules.conv._ConvNd)
    }
    assert all(conv.convert or conv.reason for conv in plan.convs)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "r3d_18"])
def test_outputs_are_the_same_in_float32_and_any_batch(name: str) -> None:
    check_equal(name, "dynet", torch.float32, (1, 2, 5), training=False)


@pytest.mark.sweep
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [n for n in zoo.names() if not any(part in n for part in zoo.TOO_LARGE)])
def test_outputs_are_the_same_for_all_of_torchvision(name: str, method: str) -> None:
    check_equal(name, method, torch.float64, (1, 2, 5), training=True)
    check_equal(name, method, torch.float32, (1, 2, 5), training=False)


CONVS = {
    "1d": (nn.Conv1d, dict(in_channels=6, out_channels=8, kernel_size=3, padding=1)),
    "1d-strided": (nn.Conv1d, dict(in_channels=6, out_channels=8, kernel_size=5, stride=2, bias=False)),
    "2d": (nn.Conv2d, dict(in_channels=6, out_channels=8, kernel_size=3)),
    "2d-uneven": (nn.Conv2d, dict(in_channels=6, out_channels=8, kernel_size=(1, 5), padding=(0, 2), stride=(2, 1))),
    "2d-1x1": (nn.Conv2d, dict(in_channels=6, out_channels=8, kernel_size=1, bias=False)),
    "2d-grouped": (nn.Conv2d, dict(in_channels=6, out_channels=9, kernel_size=3, groups=3)),
    "2d-depthwise": (nn.Conv2d, dict(in_channels=6, out_channels=12, kernel_size=3, groups=6, padding=1)),
    "2d-dilated": (nn.Conv2d, dict(in_channels=6, out_channels=8, kernel_size=3, dilation=2, padding=2)),
    "2d-same": (nn.Conv2d, dict(in_channels=6, out_channels=8, kernel_size=(4, 3), padding="same", dilation=(1, 2))),
    "2d-valid": (nn.Conv2d, dict(in_channels=6, out_channels=8, kernel_size=3, padding="valid")),
    "2d-reflect": (
        nn.Conv2d,
        dict(in_channels=6, out_channels=8, kernel_size=3, padding=(2, 1), padding_mode="reflect"),
    ),
    "2d-circular": (nn.Conv2d, dict(in_channels=6, out_channels=8, kernel_size=3, padding=1, padding_mode="circular")),
    "2d-circular-same": (
        nn.Conv2d,
        dict(in_channels=6, out_channels=8, kernel_size=(2, 4), padding="same", padding_mode="circular"),
    ),
    "3d": (nn.Conv3d, dict(in_channels=6, out_channels=8, kernel_size=3, padding=1)),
    "3d-replicate": (
        nn.Conv3d,
        dict(in_channels=6, out_channels=8, kernel_size=(1, 3, 3), padding=(0, 1, 1), padding_mode="replicate"),
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CONVS)
def test_every_kind_of_conv(case: str, method: str) -> None:
    cls, options = CONVS[case]
    torch.manual_seed(0)
    # The convs on either side make a stem, and a conv that would see a mistake in the shape.
    model = nn.Sequential(cls(6, 6, 1), nn.ReLU(), cls(**options)).double()
    example = torch.randn(5, 6, *(9, 8, 7)[: len(model[2].kernel_size)]).double()
    dynamic = dyconvert.convert(model, method=method, example=example)
    assert isinstance(dynamic[2], dyconvert.DynamicConv)
    for batch in (1, 2, 5):
        assert dyconvert.verify(model, dynamic, example[:batch]).relative < 1e-12


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("scope", ["layer", "block"])
@pytest.mark.parametrize("reduction", [0, 2])
def test_any_mixture_of_the_four_fields(per: str, activation: str, scope: str, reduction: int) -> None:
    method = dyconvert.Method(
        name="mine", g=3, per=per, activation=activation, scope=scope, reduction=reduction or None
    )
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10).double().eval()
    images = torch.randn(2, 3, 32, 32).double()
    dynamic = dyconvert.convert(model, method=method, example=images)
    assert dyconvert.verify(model, dynamic, images).relative < 1e-12
    shared = isinstance(dynamic.layer1[0].conv1.coefficient_predictor, type(None))
    assert shared == (scope == "block")
    conv = dynamic.layer1[0].conv1
    predictor = conv.block_predictor if shared else conv.coefficient_predictor
    mixtures = predictor(torch.randn(2, 64, 4, 4).double())
    assert [tuple(m.experts.shape) for m in mixtures] == [(2, 3, 64 if per == "channel" else 1)] * (2 if shared else 1)


def test_coefficients_follow_the_equations() -> None:
    """Against the papers' equations, written down plainly: DyNet per channel and block, softmax with temperature."""
    torch.manual_seed(0)
    model = zoo.build("resnet18").double()
    block = dyconvert.convert(model, method="dyconv", g=3, scope="block", temperature=7.0).layer1[0]
    dynet = dyconvert.convert(model, method="dynet", g=3).layer1[0]
    x = torch.randn(4, 64, 5, 5).double()
    for converted in (block, dynet):
        predictor = converted.conv1.block_predictor
        nn.init.normal_(predictor.linear.weight)
        nn.init.normal_(predictor.linear.bias)
        pooled = x.mean(dim=(2, 3))
        logits = F.linear(F.relu(F.linear(pooled, predictor.hidden.weight, predictor.hidden.bias)), *_affine(predictor))
        first = predictor(x)[0].experts
        channels = first.shape[2]
        logits = logits[:, : 3 * channels].view(4, 3, channels)
        expected = logits.sigmoid() if converted is dynet else (logits / 7.0).softmax(dim=1)
        assert torch.allclose(first, expected, atol=1e-12)
        # w~_t = sum_i eta_t^i w_t^i, one image at a time.
        experts = converted.conv1.weight.view(3, 64, 64, 3, 3)
        for image, eta in zip(x, first, strict=True):
            kernel = (experts * eta.view(3, -1, 1, 1, 1)).sum(0)
            plain = F.conv2d(image[None], kernel, padding=1)
            assert torch.allclose(converted.conv1(image[None], eta[None]), plain, atol=1e-10)


def _affine(predictor: dyconvert.CoefficientPredictor) -> tuple[torch.Tensor, torch.Tensor]:
    return predictor.linear.weight, predictor.linear.bias


def test_one_expert_is_channel_attention() -> None:
    model = zoo.build("resnet18").double()
    dynamic = dyconvert.convert(model, method="dynet", g=1)
    images = zoo.images("resnet18", 2, torch.float64)
    assert dyconvert.verify(model, dynamic, images).relative < 1e-12
    conv = dynamic.layer1[0].conv1
    x, gate = torch.randn(2, 64, 8, 8).double(), torch.rand(2, 1, 64).double()
    gated = F.conv2d(x, conv.weight, padding=1) * gate.view(2, 64, 1, 1)
    assert torch.allclose(conv(x, gate), gated, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("mobilenet_v3_small", method) for method in METHODS),
        *((name, METHODS[0]) for name in ("resnet18", "googlenet", "densenet121")),
    ],
)
def test_not_stuck(name: str, method: str) -> None:
    """After one SGD step on random labels all experts have moved, differ, and every predictor has started."""
    dynamic = dyconvert.convert(zoo.build(name).double(), method=method).train()
    before = {n: p.detach().clone() for n, p in dynamic.named_parameters()}
    optimizer = torch.optim.SGD(dynamic.parameters(), lr=0.1)
    images, labels = zoo.images(name, 4, torch.float64), torch.tensor([1, 20, 300, 999])
    outputs = [t for t in tree_leaves(dynamic(images)) if isinstance(t, torch.Tensor)]
    sum(F.cross_entropy(output, labels) for output in outputs).backward()
    optimizer.step()
    for conv_name, conv in dynamic.named_modules():
        if isinstance(conv, dyconvert.DynamicConv):
            now = conv.weight.unflatten(0, (conv.g, -1))
            moved = now - before[f"{conv_name}.weight"].view_as(now)
            assert all(expert.abs().max() > 0 for expert in moved), conv_name
            assert all(not torch.equal(now[i], now[j]) for i in range(conv.g) for j in range(i)), conv_name
        elif isinstance(conv, dyconvert.CoefficientPredictor):
            assert conv.linear.weight.abs().max() > 0, conv_name
