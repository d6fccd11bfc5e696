"""fuse: the same outputs with fewer batch norms, and only those that may go."""

import copy
import pickle

import pytest
import torch
import torchvision
from nets import IMAGE, ResidualNet, seeded
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from varied import coefficient_spread, randomised, with_statistics

import dyconvert
from dyconvert.nn import DynamicConv
from dyconvert.nn import dispatch as kernels
from dyconvert.surgery.collapse import collapse
from dyconvert.surgery.fuse import fuse

METHODS = tuple(dyconvert.METHODS)

# Model: how many of its batch norms directly follow a conv. The other DenseNet ones come before the convs.
FUSED = {
    "resnet18": (20, 20),
    "mobilenet_v2": (52, 52),
    "mobilenet_v3_small": (34, 34),
    "shufflenet_v2_x0_5": (56, 56),
    "efficientnet_b0": (49, 49),
    "densenet121": (59, 121),
}
FAST = {("mobilenet_v3_small", "dynet"), ("shufflenet_v2_x0_5", "dynet"), ("resnet18", "dyconv")}

# float32's rounding, of scales and weights, through the depth of these models; in float64 it is 2e-16 a step.
FLOAT32, FLOAT64 = 1e-5, 1e-10


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, _BatchNorm) for m in model.modules())


def images(batch: int = 2, dims: int = 2) -> torch.Tensor:
    return torch.randn(batch, *IMAGE[dims], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if (name, method) in FAST else pytest.mark.sweep)
        for name in FUSED
        for method in METHODS
    ],
)
def test_torchvision_models_compute_the_same(name, method):
    x = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    x = x * torch.linspace(0.5, 3, 16).view(16, 1, 1, 1)  # their levels differ, so that the coefficients do
    model = with_statistics(seeded(torchvision.models.get_model, name, weights=None), x)
    dynamic = randomised(dyconvert.convert(model, method=method, g=3))
    assert coefficient_spread(dynamic, x) > 0.01  # else little would be mixed
    fused = fuse(dynamic)
    followed, all_norms = FUSED[name]
    assert (norms(dynamic), norms(fused)) == (all_norms, all_norms - followed)
    assert len(fused.dyconvert_fused) == followed
    x = x[::8]
    assert type(fused) is type(model)
    # It matters: without the shifts it computes something else.
    broken = copy.deepcopy(fused)
    for module in broken.modules():
        if isinstance(module, dyconvert.DynamicConv):
            module.shift = None
    assert dyconvert.verify(dynamic, broken, x).relative > 1e-3
    one = x[:1, :, :32, :32]  # depthwise convs in float64 are slow
    exact = copy.deepcopy(dynamic).double()
    assert dyconvert.verify(exact, fuse(exact), one.double()).relative < FLOAT64
    # Random weights amplify float32's rounding, in the model as in the fused one: it is to be no further off.
    own, ours = (apart(model, exact, one) for model in (dynamic, fused))
    assert ours < max(FLOAT32, 3 * own)


def apart(model: nn.Module, exact: nn.Module, x: torch.Tensor) -> float:
    """A float32 model's distance from the same in float64, relative to the largest output."""
    with torch.no_grad():
        expected = exact(x.double())
        return ((model(x).double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("method", "dims"), [*((method, dims) for method in METHODS for dims in (1, 2)), (METHODS[0], 3)]
)
def test_every_dimension(method, dims):
    model = with_statistics(seeded(ResidualNet, dims=dims)).double()
    dynamic = randomised(dyconvert.convert(model, method=method))
    fused = fuse(dynamic)
    assert norms(fused) == 0
    assert dyconvert.verify(dynamic, fused, images(3, dims).double()).relative < FLOAT64


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_timm_activations_after_the_norm_stay(name):
    timm = pytest.importorskip("timm")
    model = with_statistics(seeded(timm.create_model, name))
    dynamic = randomised(dyconvert.convert(model), std=0.2)
    fused = fuse(dynamic)
    assert norms(fused) == 0
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert dyconvert.verify(dynamic, fused, x).relative < FLOAT32


def test_a_static_model_is_fused_too(net):
    with_statistics(net)
    fused = fuse(net)
    assert norms(fused) == 0
    assert dyconvert.verify(net, fused, images()).relative < FLOAT32


def test_the_given_model_stays_as_it_is(net):
    dynamic = with_statistics(randomised(dyconvert.convert(net)))
    before = copy.deepcopy(dynamic)
    fuse(dynamic)
    assert list(before.state_dict()) == list(dynamic.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), dynamic.state_dict().values()))  # noqa: B905
    assert not any(key.endswith("shift") for key in dynamic.state_dict())


def test_what_a_fused_model_can_do(net, tmp_path):
    dynamic = with_statistics(randomised(dyconvert.convert(net)))
    fused = fuse(dynamic)
    assert isinstance(fused.layer1[0], type(net.layer1[0]))
    assert fused.dyconvert_fused[0] == ("layer1.0.conv1", "layer1.0.bn1")
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert dyconvert.verify(fused, copied, images()).absolute == 0
    # Mixing and folding commute.
    assert dyconvert.verify(collapse(dynamic), collapse(fused), images()).relative < FLOAT32
    with pytest.raises(dyconvert.ModelError, match="before it was fused"):
        dyconvert.save(fused, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert fuse(fused).dyconvert_fused == ()


def test_biases_and_channels_last(net):
    conv = net.layer1[0].conv2
    net.layer1[0].conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=True)
    net.layer1[0].conv2.weight.data.copy_(conv.weight)
    net.to(memory_format=torch.channels_last)
    dynamic = with_statistics(randomised(dyconvert.convert(net)))
    fused = fuse(dynamic)
    assert dyconvert.verify(dynamic, fused, images()).relative < FLOAT32
    assert fused.layer1[0].conv2.weight.stride() == dynamic.layer1[0].conv2.weight.stride()


@pytest.mark.parametrize("method", METHODS)
def test_transposed_convs(method):
    model = with_statistics(
        seeded(
            lambda: nn.Sequential(
                nn.Conv2d(3, 8, 3),
                nn.ConvTranspose2d(8, 12, 3, stride=2, groups=2, output_padding=1),
                nn.BatchNorm2d(12),
                nn.ConvTranspose2d(12, 4, 2, bias=False),
                nn.BatchNorm2d(4),
            )
        )
    ).double()
    dynamic = dyconvert.convert(model, method=method)
    assert dyconvert.verify(model, collapse(dynamic), images().double()).relative < FLOAT64
    fused = fuse(randomised(dynamic))
    assert len(fused.dyconvert_fused) == 2
    assert dyconvert.verify(dynamic, fused, images().double()).relative < FLOAT64
    same = images(1).double().expand(3, -1, -1, -1)
    assert dyconvert.verify(dynamic, collapse(dynamic, [same]), same).relative < FLOAT64
    assert dyconvert.verify(fuse(model), model, images().double()).relative < FLOAT64


class _Net(nn.Module):
    """Two convs and two batch norms; what `forward` does with them decides."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.other = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.conv(self.stem(x)))


class _UsedTwice(_Net):
    def forward(self, x):
        y = self.conv(self.stem(x))
        return self.bn(y) + y


class _ConvTwice(_Net):
    def forward(self, x):
        x = self.bn(self.conv(self.stem(x)))
        return self.other(self.conv(x))


class _NormTwice(_Net):
    def forward(self, x):
        return self.bn(self.conv(self.bn(self.stem(x))))


class _Between(_Net):
    def forward(self, x):
        return self.bn(self.conv(self.stem(x)).relu())


class _PreActivation(_Net):
    def forward(self, x):
        return self.conv(self.bn(self.stem(x).relu()))


class _ReadsWeight(_Net):
    def forward(self, x):
        return self.bn(self.conv(self.stem(x))) + self.conv.weight.mean()


class _Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.conv(x))


class _CalledFromOutside(nn.Module):
    """Can't be traced as a whole, and calls a conv of `inner` by itself."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = _Inner()
        self.second = _Inner()

    def forward(self, x):
        x = self.stem(x)
        if x.shape[-1] > 4:
            x = self.second(x)
        return self.inner(x) + self.inner.conv(x)


@pytest.mark.parametrize("convert", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    ("build", "fused"),
    [
        (_Net, [("conv", "bn")]),
        (_UsedTwice, []),
        (_ConvTwice, []),
        (_NormTwice, []),
        (_Between, []),
        (_PreActivation, []),
        (_ReadsWeight, []),
        (_CalledFromOutside, [("second.conv", "second.bn")]),
    ],
)
def test_only_what_directly_and_only_follows(build, fused, convert):
    model = with_statistics(seeded(build)).double()
    if convert:
        model = randomised(dyconvert.convert(model, method="condconv", include_stem=True))
    result = fuse(model, images().double())
    assert list(result.dyconvert_fused) == fused
    assert dyconvert.verify(model, result, images().double()).relative < FLOAT64


def _hooked(model):
    model.conv.register_forward_hook(lambda module, args, output: output + 1)


def _tied(model):
    model.stem = nn.Conv2d(8, 8, 3, padding=1)
    model.stem.weight = model.conv.weight


def _without_statistics(model):
    model.bn = nn.BatchNorm2d(8, track_running_stats=False)


@pytest.mark.parametrize("change", [_hooked, _tied, _without_statistics])
def test_what_else_is_in_the_way(change):
    model = with_statistics(seeded(_Net))
    change(model)
    model.eval()
    result = fuse(model)
    assert result.dyconvert_fused == ()


def test_training_mode_is_refused(net):
    with pytest.raises(dyconvert.ModelError, match=r"Call model.eval\(\) first"):
        fuse(dyconvert.convert(net).train())
    dynamic = dyconvert.convert(net).eval()
    dynamic.layer1[1].bn2.train()
    with pytest.raises(dyconvert.ModelError, match=r"batch norm layer1\.1\.bn2"):
        fuse(dynamic)


def test_an_example_is_guessed_for_a_model_whose_stem_is_dynamic():
    """Parts that are traced alone need a trial run, for which an input is guessed from the first conv."""

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x):
            return self.body(x) if x.sum() > 0 else self.body(-x)

    dynamic = dyconvert.convert(Branching().eval(), include_stem=True)
    assert fuse(dynamic).dyconvert_fused == (("body.0", "body.1"),)


@pytest.mark.parametrize("method", dyconvert.METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_experts_in_half_precision(net, method, dtype, tolerance):
    """A weight has 11 or 8 bits then; rounding is random, so a few convs in a row add up to no more than that."""
    fused = fuse(with_statistics(randomised(dyconvert.convert(net, method=method))))
    halved = fuse(fused, bank_dtype=dtype)
    banks = [m.weight for m in halved.modules() if isinstance(m, DynamicConv)]
    assert {bank.dtype for bank in banks} == {dtype}
    assert all(p.dtype == torch.float32 for p in halved.parameters() if all(p is not bank for bank in banks))
    for batch in (1, 2, 40):
        assert 0 < dyconvert.verify(fused, halved, images(batch)).relative < tolerance
    # Every strategy computes with it, and what was exported or collapsed does, too.
    for strategy in ("groups", "unfold", "features"):
        with kernels.force(strategy):
            assert dyconvert.verify(fused, halved, images()).relative < tolerance
    assert dyconvert.verify(collapse(fused), collapse(halved), images()).relative < tolerance
    assert next(collapse(halved).parameters()).dtype == torch.float32


def test_experts_too_large_for_half_precision_are_refused(net):
    dynamic = dyconvert.convert(net)
    dynamic.layer1[0].conv1.weight.data.mul_(1e7)
    with pytest.raises(dyconvert.ModelError, match=r"layer1\.0\.conv1 doesn't fit into torch.float16"):
        fuse(dynamic, bank_dtype=torch.float16)
    with pytest.raises(dyconvert.ModelError, match="isn't half precision"):
        fuse(dynamic, bank_dtype=torch.int8)
