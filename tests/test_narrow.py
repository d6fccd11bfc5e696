"""narrow(): fewer channels, and weights that compute nearly the same."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import ResidualNet, same, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import dyconvert
from dyconvert import ModelError, PlanError, models
from dyconvert.analysis.flops import macs

pytest.importorskip("torch_pruning")


class Net(nn.Module):
    """Stem, residual blocks, and one more part that a case puts in between: `[N, 3, 16, 16]` to `[N, 5]`."""

    def __init__(self, middle: nn.Module | None = None, width: int = 16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.middle = middle or nn.Identity()
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(F.relu(self.bn1(self.conv1(self.stem(x)))))
        return self.head(F.relu(self.conv2(x)).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(width, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(24, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b(self.a(x)))


class Excite(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 8, 1), nn.Conv2d(8, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


class Branches(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.a, self.b = nn.Conv2d(width, 8, 1), nn.Conv2d(width, 24, 3, padding=1)
        self.join = nn.Sequential(nn.BatchNorm2d(32 + width), nn.ReLU(), nn.Conv2d(32 + width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([self.a(x), x, self.b(x)], 1))


class Shuffle(nn.Module):
    """ShuffleNetV2's unit: half of the channels pass, then all are shuffled."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(width // 2, 12, 1), nn.ReLU(), nn.Conv2d(12, width // 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        x = torch.cat([a, self.inner(b)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


MIDDLES = {
    "plain": nn.Identity,
    "residual": Residual,
    "squeeze-excite": Excite,
    "concatenation": Branches,
    "shuffle": Shuffle,
    "depthwise": lambda: nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)),
    "grouped": lambda: nn.Conv2d(16, 16, 3, padding=1, groups=4),
    "group norm": lambda: nn.GroupNorm(4, 16),
    "strided, dilated": lambda: nn.Conv2d(16, 16, (3, 2), stride=2, padding=(2, 1), dilation=2),
}


def images(count: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def net(kind: str = "residual") -> nn.Module:
    return settled(seeded(lambda: Net(MIDDLES[kind]())))


def settled(model: nn.Module, like: Tensor | None = None) -> nn.Module:
    """Batch norms whose statistics are those of images, as a trained model's are."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            for p, least in ((module.weight, 0.5), (module.bias, -0.5)):
                if p is not None:
                    nn.init.uniform_(p, least, least + 1, generator=generator)
    with torch.no_grad():
        model.train()(images() if like is None else like)
    return model.eval()


def error(model: nn.Module, narrow: nn.Module) -> float:
    """Mean square of the difference on new images, over the outputs' variance."""
    x = images(seed=5)
    with torch.no_grad():
        a, b = model.eval()(x), narrow.eval()(x)
    return ((a - b).square().mean() / a.var(0).mean()).item()


# ---- What comes out ----


@pytest.mark.parametrize("kind", MIDDLES)
def test_every_way_channels_are_coupled(kind, tmp_path):
    model = net(kind)
    before = copy.deepcopy(model.state_dict())
    narrow = dyconvert.narrow(model, width=0.5, data=images(), g=2)
    assert same(model, before)
    assert type(narrow) is type(model)
    assert narrow.conv2.in_channels == (16 if kind == "shuffle" else 8)
    assert narrow.conv2.out_channels == 16
    assert narrow(images(2)).shape == (2, 5)
    narrow.train()(images(4)).square().mean().backward()
    assert all(p.grad is not None for p in narrow.parameters())
    narrow.eval()
    for again in (
        copy.deepcopy(narrow),
        pickle.loads(pickle.dumps(narrow)),
        dyconvert.load(dyconvert.save(narrow, tmp_path / "saved"), model),
    ):
        assert torch.equal(again(images(2)), narrow(images(2)))


@pytest.mark.parametrize("kind", MIDDLES)
def test_least_squares_beats_merging_and_pruning(kind):
    model = net(kind)
    errors = {
        init: error(model, dyconvert.narrow(model, width=0.5, data=images(256), init=init, static=True))
        for init in ("least-squares", "merge", "l1")
    }
    assert errors["least-squares"] < 0.7 * min(errors["merge"], errors["l1"])


@pytest.mark.parametrize("init", ["least-squares", "merge"])
def test_channels_that_say_the_same_are_free(init):
    """Twice the same channels, and readers that take half of each: half of them compute the whole."""
    small = settled(seeded(lambda: Net(Residual(), width=16)))
    model = Net(Residual(32), width=32).eval()
    with torch.no_grad():
        for (name, wide), (_, t) in zip(model.state_dict().items(), small.state_dict().items(), strict=True):
            if not wide.dim():
                continue
            for dim, (to, whole) in enumerate(zip(wide.shape, t.shape, strict=True)):
                if to == 2 * whole:
                    t = torch.cat([t, t], dim)
                    # Readers of twins take half of each.
                    t = t / 2 if dim == 1 else t
            wide.copy_(t) if wide.shape == t.shape else pytest.fail(name)
    x = images(8, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(model(x), small(x))
        narrow = dyconvert.narrow(model, width=0.5, data=images(), init=init, static=True, keep=["middle.a"])
        assert narrow.conv1.out_channels == 16
        # Least squares: what the ridge takes away. Merging is exact, up to rounding.
        assert error(model, narrow) < (1e-3 if init == "least-squares" else 1e-9)


def test_with_all_channels_least_squares_gives_the_model_back():
    model = net()
    narrow = dyconvert.narrow(model, width=1.0, data=images(), static=True)
    assert {n: p.shape for n, p in narrow.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert error(model, narrow) < 1e-9


def test_the_dynamic_model_computes_what_the_static_one_does():
    model = net()
    static, dynamic = (
        dyconvert.narrow(model, width=0.5, data=images(), static=static, **choices)
        for static, choices in ((True, {}), (False, {"g": 4, "exclude": ["conv2"]}))
    )
    assert isinstance(dynamic.conv1, dyconvert.DynamicConv2d)
    assert type(dynamic.conv2) is nn.Conv2d
    # float32's rounding, as for any conversion.
    assert dyconvert.verify(static, dynamic, images(4)).relative < 1e-4


def test_batch_statistics_are_those_of_the_narrow_model():
    """In training mode, the first batch of clean images gives nearly what eval mode does."""
    model = net("concatenation")
    narrow = dyconvert.narrow(model, width=0.5, data=images(256), static=True)
    x = images(256)
    with torch.no_grad():
        a, b = narrow.eval()(x), narrow.train()(x)
    assert ((a - b).square().mean() / a.var(0).mean()).item() < 0.01


def test_l1_keeps_the_strongest_filters():
    model = net("plain")
    with torch.no_grad():
        model.conv2.weight[::2] *= 10
    narrow = dyconvert.narrow(model, width=0.5, init="l1", static=True)
    # Half of the inputs are gone, so of ten times the weight about five times are left.
    assert (narrow.conv2.weight.abs().sum((1, 2, 3)) > 3 * model.conv2.weight[1].abs().sum()).all()


def test_what_keeps_its_channels():
    narrow = dyconvert.narrow(net(), width=0.5, keep=["conv2"], static=True)
    assert narrow.stem[0].out_channels == 16  # nothing adds to it
    assert narrow.conv2.out_channels == 32
    assert narrow.head.out_features == 5
    assert {g.kept for g in narrow.dyconvert_narrowing.groups if g.kept} == {
        "the stem",
        "kept by a pattern",
        "the model's output",
    }
    assert "conv1: 16 -> 8" in str(narrow.dyconvert_narrowing)
    # A stream that is tied to the stem is narrowed with it.
    assert dyconvert.narrow(seeded(ResidualNet), width=0.5, static=True).stem.out_channels == 4


@pytest.mark.parametrize(("round_to", "channels"), [(8, 24), (16, 16), (1, 23)])
def test_rounding(round_to, channels):
    model = seeded(lambda: Net(width=128))
    narrow = dyconvert.narrow(model, width=0.18, round_to=round_to, static=True)
    assert narrow.conv1.out_channels == channels


@pytest.mark.parametrize("target", [0.6, 0.2])
@pytest.mark.parametrize("static", [True, False])
def test_a_flops_target_is_met(target, static):
    model = net()
    narrow = dyconvert.narrow(model, flops=target, data=images(), static=static, **({} if static else {"g": 3}))
    share = macs(narrow, images(1)) / macs(model, images(1))
    assert 0.6 * target < share <= target


def test_inplace_mode_hooks_and_requires_grad():
    model = net().train()
    model.conv1.weight.requires_grad_(False)
    calls = []
    model.conv2.register_forward_hook(lambda *_: calls.append(1))
    narrow = dyconvert.narrow(model, width=0.5, data=images(), static=True, inplace=True)
    assert narrow is model
    assert model.conv1.out_channels == 8
    assert model.training
    assert not model.conv1.weight.requires_grad
    assert not calls
    model(images(2))
    assert calls == [1]


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims):
    model = seeded(ResidualNet, dims=dims)
    x = torch.randn(16, 3, *([16] if dims == 1 else [4, 8, 8]))
    narrow = dyconvert.narrow(model, width=0.5, data=x)
    assert narrow.layer1[0].conv1.out_channels == 4
    assert narrow(x[:2]).shape == (2, 5)


@pytest.mark.parametrize("wrap", [lambda x: [(x, torch.zeros(64))], lambda x: list(x.split(16)), lambda x: [{"x": x}]])
def test_data_comes_in_the_usual_forms(wrap):
    assert same(*(dyconvert.narrow(net(), width=0.5, data=d, static=True) for d in (images(), wrap(images()))))


# ---- What is refused ----


class Mixes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(2, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.pixel_shuffle(self.conv1(x), 2))


class Counts(Net):
    """Its forward counts on the number of channels."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.conv2(self.conv1(x) * torch.ones(16, 1, 1))).mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "options", "kind", "says"),
    [
        (net, {"width": 0}, PlanError, r"width=0 .*0 < width <= 1"),
        (net, {"width": 1.5}, PlanError, "width=1.5"),
        (net, {"flops": -1}, PlanError, "flops=-1"),
        (net, {"flops": 1e-4, "static": True}, ModelError, r"can't be reached: at the narrowest, 0\.\d+ .*Ask for 0"),
        (net, {}, PlanError, "Give one of the two"),
        (net, {"width": 0.5, "flops": 0.5}, PlanError, "Give one of the two"),
        (net, {"width": 0.5, "init": "least-squares"}, PlanError, r"images, and there are none.*`data="),
        (net, {"width": 0.5, "init": "magic"}, PlanError, "least-squares, merge, l1"),
        (net, {"width": 0.5, "data": []}, ModelError, "holds no images"),
        (net, {"width": 0.5, "data": ["cat.png"]}, ModelError, "gave a str"),
        (net, {"width": 0.5, "data": torch.zeros(4, 1, 16, 16)}, ModelError, "rejects"),
        (net, {"width": 0.5, "example": torch.zeros(1, 1, 16, 16)}, ModelError, "rejects"),
        (net, {"width": 0.5, "keep": ["conv9"]}, PlanError, "conv9"),
        (net, {"width": 0.5, "round_to": 0}, PlanError, "round_to"),
        (net, {"width": 0.5, "calibration_images": 0}, PlanError, "calibration_images"),
        (net, {"width": 0.5, "static": True, "exclude": ["conv1"]}, PlanError, "exclude"),
        (net, {"width": 0.5, "method": "magic"}, PlanError, "magic"),
        (lambda: nn.Linear(2, 2), {"width": 0.5}, ModelError, "no convs"),
        (lambda: dyconvert.convert(net()), {"width": 0.5}, ModelError, "already converted"),
        (lambda: dyconvert.narrow(net(), width=0.5, static=True), {"width": 0.5}, ModelError, "narrowed already"),
        (Mixes, {"width": 0.5}, ModelError, "PixelShuffle"),
        (Counts, {"width": 0.5}, ModelError, r"doesn't run .*keep="),
    ],
)
def test_bad_input(make, options, kind, says):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=f"(?s){says}"):
        dyconvert.narrow(model, inplace=True, **{"example": torch.zeros(2, 3, 16, 16)} | options)
    assert same(model, before)


# ---- Real weights, real images ----


@pytest.mark.parametrize(("name", "file"), [("resnet20", "resnet20-12fca82f.th")])
def test_a_cifar_resnet_of_half_the_width(name, file, data_dir):
    from test_real_weights import top1

    model, _ = models.create(f"cifar-{name}", str(data_dir / "cifar10_resnets" / file))
    narrow = dyconvert.narrow(model, width=0.5, data=cifar(data_dir, "train_1")[0], static=True)
    assert macs(narrow, images(1)) / macs(model, images(1)) < 0.27
    # The bar of the project, measured on all 10,000; these are 4,000, whose standard error is 0.8.
    assert top1(narrow, *(t[:4000] for t in cifar(data_dir, "test"))) > 60


def cifar(data_dir: Path, name: str) -> tuple[Tensor, Tensor]:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    pixels = np.asarray(Image.open(data_dir / "cifar10" / f"{name}.png")).reshape(-1, 32, 32, 3)
    x = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float().div(255)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    labels = torch.from_numpy(np.load(data_dir / "cifar10" / f"{name}_labels.npy").astype(np.int64))
    return (x - mean) / std, labels
