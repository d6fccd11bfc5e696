"""Convs that are no plain `nn.Conv2d`: transposed, timm's, and those that are skipped by name and reason."""

import pytest
import torch
import torchvision.ops
from nets import ResidualNet, image, seeded
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import weight_norm

import dyconvert

METHODS = tuple(dyconvert.METHODS)


class Decoder(nn.Module):
    """A block of two transposed convs, the second with the size of its output given."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1, output_padding=1, groups=groups)
        self.last = nn.ConvTranspose2d(12, 6, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).relu()
        return self.last(x, output_size=[2 * x.shape[2] + 1, 2 * x.shape[3]])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", [1, 4])
def test_transposed(method: str, groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), seeded(Decoder, groups)).double()
    dynamic = dyconvert.convert(model, method=method, example=image(dtype=torch.float64))
    assert isinstance(dynamic[2].up, dyconvert.DynamicConvTranspose2d)
    assert isinstance(dynamic[2].last, dyconvert.DynamicConvTranspose2d)
    for batch in (1, 3):
        assert dyconvert.verify(model, dynamic, image(batch, dtype=torch.float64)).relative < 1e-12


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_mixes_each_image_with_its_own_coefficients(dims: int) -> None:
    cls = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    torch.manual_seed(0)
    model = nn.Sequential(cls(6, 8, 3, stride=2, groups=2)).double()
    x = torch.randn(3, 6, *(5, 4, 3)[:dims]).double()
    conv = dyconvert.convert(model, g=2, example=x)[0]
    eta = torch.rand(3, 2, 8).double()
    out = conv(x, coefficients=eta)
    weights, biases = conv.weight.unflatten(0, (2, -1)), conv.bias.unflatten(0, (2, -1))
    for n in range(3):
        # A coefficient scales an output channel, so mixing the experts' outputs is the same.
        plain = nn.utils.skip_init(cls, 6, 8, 3, stride=2, groups=2).double()
        expected = 0
        for i in range(2):
            plain.weight, plain.bias = nn.Parameter(weights[i]), nn.Parameter(biases[i])
            expected = expected + plain(x[n : n + 1]) * eta[n, i].view(1, -1, *[1] * dims)
        assert torch.allclose(out[n : n + 1], expected, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [15, 16])
@pytest.mark.parametrize("name", ["Conv2dSame", "StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"])
def test_timms_convs(name: str, size: int, method: str) -> None:
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    convs = [getattr(layers, name)(8, 8, 3, stride=stride) for stride in (1, 2)]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *convs).double().eval()
    if hasattr(convs[0], "gain"):
        nn.init.uniform_(convs[0].gain, 0.5, 2.0)
    x = torch.randn(2, 3, size, size).double()
    plan = dyconvert.plan(model, method, example=x)
    assert [conv.convert for conv in plan.convs] == [False, True, True]
    dynamic = dyconvert.convert(model, plan)
    assert dyconvert.verify(model, dynamic, x).relative < 1e-12


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight.abs(), bias)


class Subclass(nn.Conv2d):
    """Nothing of its own: converts."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda conv: OwnForward(8, 8, 3, padding=1, bias=False), "OwnForward has a forward of its own"),
        (lambda conv: OwnConvForward(8, 8, 3, padding=1, bias=False), "OwnConvForward has a forward of its own"),
        (lambda conv: weight_norm(conv), "computed by a hook"),
        (parametrizations.weight_norm, "parametrized"),
        (parametrizations.spectral_norm, "parametrized"),
        (lambda conv: Subclass(8, 8, 3, padding=1, bias=False), None),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_skipped_by_name_and_reason(change, reason: str | None) -> None:
    model = seeded(ResidualNet)
    model.layer1[0].conv1 = change(model.layer1[0].conv1)
    entry = dyconvert.plan(model, example=image())["layer1.0.conv1"]
    if reason is None:
        assert entry.convert
    else:
        assert reason in entry.reason
    dynamic = dyconvert.convert(model, example=image())
    assert dyconvert.verify(model, dynamic, image()).relative < 1e-5


def test_tied_weights_are_skipped() -> None:
    model = seeded(ResidualNet)
    model.layer1[0].conv2.weight = model.layer1[0].conv1.weight
    plan = dyconvert.plan(model, example=image())
    assert "tied" in plan["layer1.0.conv1"].reason
    assert dyconvert.verify(model, dyconvert.convert(model, plan), image()).relative < 1e-5


def test_deformable_convs_are_skipped() -> None:
    class Deforms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.offsets = nn.Conv2d(8, 18, 3, padding=1)
            self.conv = torchvision.ops.DeformConv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.conv(x, self.offsets(x))

    model = seeded(Deforms)
    plan = dyconvert.plan(model, example=image())
    assert "deformable" in plan["conv"].reason
    assert plan["offsets"].convert
    assert dyconvert.verify(model, dyconvert.convert(model, plan), image()).relative < 1e-5


class Loops(nn.Module):
    """A branch on the images' values, before both convs: for other images, they might see others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if x.mean() < 1e9 else x


class Reverses(Loops):
    """Its second conv sees the images in the opposite order."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).flip(0)).flip(0)


def test_a_block_whose_convs_see_other_images_converts_per_layer_or_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), seeded(Loops), seeded(Reverses))
    plan = dyconvert.plan(model, example=image())
    assert plan["1.a"].block is plan["1.b"].block is None
    assert "chooses by the values of the images" in plan["1.b"].note
    assert plan["2.a"].block is plan["2.b"].block is None
    assert "Reverses: 2.b: it sees the images in another order" in plan["2.b"].note
    assert dyconvert.verify(model, dyconvert.convert(model, plan), image()).relative < 1e-5
    with pytest.raises(dyconvert.PlanError, match=r"2 \(Reverses.*Without strict"):
        dyconvert.plan(model, example=image(), strict=True)
    assert dyconvert.plan(seeded(ResidualNet), strict=True).blocks


@pytest.mark.parametrize(
    ("what", "bn", "experts", "predictor"),
    [
        (None, False, True, True),
        ("predictors", False, False, True),
        ("experts", False, True, True),
        ("all", True, True, True),
    ],
)
def test_trainable(what: str | None, bn: bool, experts: bool, predictor: bool) -> None:
    model = seeded(ResidualNet)
    model.layer1[0].bn1.requires_grad_(False)
    model.layer1[1].conv1.requires_grad_(False)
    dynamic = dyconvert.convert(model, trainable=what)
    block = dynamic.layer1[0]
    assert block.bn1.weight.requires_grad == bn
    assert block.conv1.weight.requires_grad == experts
    assert block.conv1.block_predictor.linear.weight.requires_grad == predictor
    assert dynamic.layer1[1].conv1.weight.requires_grad == (what in ("experts", "all"))
    assert dynamic.head.weight.requires_grad == (what in (None, "all"))


def test_trainable_refuses_what_it_does_not_know() -> None:
    with pytest.raises(dyconvert.PlanError, match="predictors"):
        dyconvert.convert(seeded(ResidualNet), trainable="some")
