"""fuse on what people write in a forward: exact, and a batch norm that stays has its reason."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from nets import seeded
from torch import Tensor, nn
from varied import randomised, with_statistics

import dyconvert

X = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
# Rounding in float64; what is wrong here is wrong by 0.1 and more.
EXACT = 1e-10


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Net(nn.Module):
    """A stem with a batch norm that may always go, and a conv and a batch norm by themselves and in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.inner = Inner()


class Follows(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.bn(self.conv(self.stem(x))))


class CalledTwice(Net):
    """By its block, so each time the batch norm follows."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.sum() > 1e9:  # so that the block is traced by itself
            return x
        return self.inner(self.inner(x).relu())


class WithoutTheArgument(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.conv(self.stem(x))
        return self.bn(y.tanh() if mask is None else y)


class WithTheArgument(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.conv(self.stem(x))
        return self.bn(y if mask is None else y.tanh())


class IsInstance(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stem(x))
        return self.bn(y.tanh() if isinstance(y, Tensor) else y)


class TypeIs(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stem(x))
        return self.bn(y.tanh() if type(y) is Tensor else y)


class HasAttr(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stem(x))
        return self.bn(y.tensors if hasattr(y, "tensors") else y.tanh())


class DictByShape(Net):
    acts: ClassVar = {16: torch.tanh}

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stem(x))
        return self.bn(self.acts.get(y.shape[-1], lambda y: y)(y))


class AlsoUsed(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stem(x))
        return self.bn(y) + (y if isinstance(y, Tensor) else 0)


class Kept(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.conv(self.stem(x))
        return self.bn(self.last)


class Returned(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(self.stem(x))
        return (self.bn(y), y) if isinstance(y, Tensor) else self.bn(y)


class InPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stem(x))
        if isinstance(y, Tensor):
            y.relu_()
        return self.bn(y)


class SharedByTwo(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.bn(self.conv(x)) + self.bn(self.second(x))


class ParentsOwnWay(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.inner.bn(self.inner.conv(x).tanh() if x.sum() < 1e9 else x)


class ParentsOtherWay(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.inner.conv(x) if x.sum() < 1e9 else x
        return self.inner.bn(y.tanh()) + self.inner(x)


class OwnWayForOneImage(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.inner(x) if len(x) > 1 else self.inner.bn(self.inner.conv(x).tanh())


class OwnWayForOtherSizes(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.inner(x) if x.shape[-1] > 8 else self.inner.bn(self.inner.conv(x).tanh())


class OwnWayForOtherValues(Net):
    def forward(self, x: Tensor) -> Tensor:
        flag = x[0, 0, 0, 0] > 0
        x = self.stem(x)
        return self.inner(x) if flag else self.inner.bn(self.inner.conv(x).tanh())


class OwnWayBySwitch(Net):
    def forward(self, x: Tensor, pre: bool = False) -> Tensor:
        x = self.stem(x)
        return self.inner.bn(self.inner.conv(x).tanh()) if pre else self.inner(x)


class OwnWayForGradients(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.inner.bn(self.inner.conv(x).tanh()) if x.requires_grad and len(x) > 0 else self.inner(x)


class WeightRead(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.inner(x) + (self.inner.conv.weight.mean() if x.sum() < 1e9 else 0)


class BiasRead(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.inner(x) + (self.inner.conv.bias.mean() if x.sum() < 1e9 else 0)


class NormsWeightRead(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.inner(x) + (self.inner.bn.weight.abs().sum() if x.sum() < 1e9 else 0)


class StatisticsRead(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.inner(x) + (self.inner.bn.running_var.sum() if x.sum() < 1e9 else 0)


class InAList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norms = [self.bn]

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[0](self.conv(self.stem(x)))


class AsksForTheNorm(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(self.stem(x)))
        return y * 2 if isinstance(self.bn, nn.BatchNorm2d) else y


class AsksForTheNormsAttributes(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.stem(x))) / self.bn.num_features


class NeverCalled(Net):
    """Both lie on a way that nothing takes in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.inner(x) if x.sum() > 1e9 or self.training else x


STEM = ("stem.0", "stem.1")
FUSED: dict[type[Net], tuple[tuple[str, str], ...]] = {
    Follows: (STEM, ("conv", "bn"), ("inner.conv", "inner.bn")),
    CalledTwice: (STEM, ("inner.conv", "inner.bn")),
}
# What stays, and the reason.
STAYS: dict[type[Net], tuple[str, str]] = {
    WithoutTheArgument: ("bn", "given to tanh"),
    WithTheArgument: ("bn", "follows no conv"),
    IsInstance: ("bn", "given to tanh"),
    TypeIs: ("bn", "given to tanh"),
    HasAttr: ("bn", "follows no conv"),
    DictByShape: ("bn", "follows no conv"),
    AlsoUsed: ("bn", "given to add"),
    Kept: ("bn", "kept, or returned"),
    Returned: ("bn", "kept, or returned"),
    InPlace: ("bn", "given to relu_"),
    SharedByTwo: ("bn", "follows no conv"),
    ParentsOwnWay: ("inner.bn", "given to tanh"),
    ParentsOtherWay: ("inner.bn", "given to tanh"),
    OwnWayForOneImage: ("inner.bn", "given to tanh"),
    OwnWayForOtherSizes: ("inner.bn", "given to tanh"),
    OwnWayForOtherValues: ("inner.bn", "given to tanh"),
    OwnWayBySwitch: ("inner.bn", "given to tanh"),
    OwnWayForGradients: ("inner.bn", "given to tanh"),
    WeightRead: ("inner.bn", "inner.conv's weight is used outside of its own forward"),
    BiasRead: ("inner.bn", "inner.conv's weight is used outside of its own forward"),
    NormsWeightRead: ("inner.bn", "inner.bn's weight is used outside of its own forward"),
    StatisticsRead: ("inner.bn", "inner.bn's weight is used outside of its own forward"),
    InAList: ("bn", "something else"),
    AsksForTheNorm: ("bn", "something else"),
    AsksForTheNormsAttributes: ("bn", "something else"),
    NeverCalled: ("inner.bn", "isn't called"),
}


def model(build: Callable[[], nn.Module], convert: bool) -> nn.Module:
    net = with_statistics(seeded(build)).double().eval()
    if not convert:
        return net
    try:
        return randomised(dyconvert.convert(net, method="dynet", include_stem=True, example=X)).eval()
    except dyconvert.PlanError:
        pytest.skip("none of its convs becomes dynamic")


@pytest.mark.parametrize("convert", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("build", FUSED, ids=lambda build: build.__name__)
def test_what_follows_goes(build: type[Net], convert: bool) -> None:
    net = model(build, convert)
    fused = dyconvert.fuse(net, X)
    assert fused.dyconvert_fused == FUSED[build]
    assert dyconvert.verify(net, fused, X).relative < EXACT


@pytest.mark.parametrize("convert", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("build", STAYS, ids=lambda build: build.__name__)
def test_what_does_not_follow_stays_with_the_reason(build: type[Net], convert: bool) -> None:
    net = model(build, convert)
    x = X.abs()  # what follows for these images only is seen, too
    fused = dyconvert.fuse(net, x)
    norm, reason = STAYS[build]
    assert reason in fused.dyconvert_unfused[norm]
    assert fused.dyconvert_fused == (STEM,)
    for images in (x, x[:1], x[..., :6, :6], -x):
        assert dyconvert.verify(net, fused, images).relative < EXACT


def test_one_that_computes_something_else_stays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison at the end finds by itself which of the folds is wrong."""
    from dyconvert.surgery import fuse as module

    fold = module._fold

    def wrong(conv: nn.Module, norm: nn.Module) -> None:
        fold(conv, norm)
        if conv.kernel_size == (1, 1):
            conv.bias = nn.Parameter(conv.bias.detach() + 0.1)

    layers: list[nn.Module] = []
    for size in (3, 3, 1, 3):
        layers += [nn.Conv2d(3 if not layers else 8, 8, size, padding=size // 2), nn.BatchNorm2d(8)]
    net = with_statistics(seeded(lambda: nn.Sequential(*layers))).double().eval()
    monkeypatch.setattr(module, "_fold", wrong)
    fused = dyconvert.fuse(net, X)
    assert [norm for _, norm in fused.dyconvert_fused] == ["1", "3", "7"]
    assert "something else" in fused.dyconvert_unfused["5"]
    assert dyconvert.verify(net, fused, X).relative < EXACT


def test_without_values_it_refuses() -> None:
    net = seeded(Follows).eval()
    with pytest.raises(dyconvert.ModelError, match="on the meta device"):
        dyconvert.fuse(net.to("meta"), X)
    narrow = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 3 * 3, 2)).eval()
    with pytest.raises(dyconvert.ModelError, match=r"Give an input: fuse\(model, example\)"):
        dyconvert.fuse(narrow)
    assert dyconvert.fuse(narrow, torch.randn(2, 3, 5, 5)).dyconvert_fused == (("0", "1"),)
    with pytest.raises(dyconvert.ModelError, match="rejects the example input"):
        dyconvert.fuse(narrow, torch.randn(2, 3, 9, 9))
