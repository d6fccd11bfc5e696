"""Convs that other code reads, patches, holds or asks for: exact, or static with a reason."""

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dyconvert
from dyconvert.nn import DynamicConv

X = torch.randn(4, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
# Rounding in float64; what is wrong here is wrong by 0.1 and more.
EXACT = 1e-12


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x).relu())


class Net(nn.Module):
    """A stem, a part that converts in any case, and the block that is looked at."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.plain = Two()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        return self.block(self.plain(self.stem(x)))


def net(block: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = Net(block)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def convert(model: nn.Module, method: str = "dynet", **options: Any) -> tuple[dyconvert.Plan, nn.Module]:
    plan = dyconvert.plan(model, method, example=X)
    dynamic = dyconvert.convert(model, plan, **options)
    assert dyconvert.verify(model, dynamic, X).relative < EXACT
    return plan, dynamic


# ---- Static, with a reason ----


class Equalised(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.conv2d(x, self.conv1.weight * 0.3, self.conv1.bias, padding=1))


class CentralDifference(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x) - 0.7 * F.conv2d(x, self.conv1.weight.sum((2, 3), keepdim=True)))


class TiedDecoder(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.conv_transpose2d(self.conv1(x), self.conv1.weight, padding=1))


class AsksTheShape(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) / self.conv1.weight.shape[0]


class AsksTheSize(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) / self.conv1.weight.size(0)


class AddsTheBias(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) + self.conv1.bias.sum()


class PenaltyInTraining(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        return y + self.conv1.weight.square().mean() if self.training else y


class CallsForward(Two):
    """Past its hooks, so nothing can be known of the call."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1.forward(x))


class InAList(Two):
    def __init__(self) -> None:
        super().__init__()
        self.also = [self.conv1]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.also[0](x))


class InADict(Two):
    def __init__(self) -> None:
        super().__init__()
        self.also = {"first": self.conv1}

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.also["first"](x))


class AsksItsClass(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.pad(self.conv1(x), (1, 1)) if isinstance(self.conv1, nn.Conv2d) else self.conv1(x))


class AsksItsType(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)[..., 1:] if type(self.conv1) is nn.Conv2d else self.conv1(x))


class Layers(Two):
    """Doubles what the chosen layers return: the same modules are called, with other values only."""

    chosen: Callable[[nn.Module], bool]

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv1, self.conv2):
            y = layer(x).tanh()
            x = y * 2 if self.chosen(layer) else y
        return x


def asking(question: Callable[[nn.Module], bool]) -> Callable[[], nn.Module]:
    return lambda: type("Layers", (Layers,), {"chosen": staticmethod(question)})()


class CountsModules(Two):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * len(list(self.modules()))


class CallsLeaves(Two):
    def forward(self, x: Tensor) -> Tensor:
        for module in self.modules():
            if not list(module.children()):
                x = module(x)
        return x


class ByWeakReference(Two):
    def __init__(self) -> None:
        super().__init__()
        self.reference = weakref.ref(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.reference()(x))


class ByClosure(Two):
    def __init__(self) -> None:
        super().__init__()
        conv = self.conv1
        self.first = lambda x: conv(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.first(x))


REGISTRY: dict[int, nn.Module] = {}


class InAGlobal(Two):
    def __init__(self) -> None:
        super().__init__()
        self.number = len(REGISTRY)
        REGISTRY[self.number] = self.conv1

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(REGISTRY[self.number](x))


class OwnCall(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class OwnGetattr(nn.Conv2d):
    def __getattr__(self, name: str) -> Any:
        return 4.0 if name == "magic" else super().__getattr__(name)


class OwnMethod(nn.Conv2d):
    def gain(self) -> float:
        return 3.0


class AsksForTheGain(Two):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.conv1.gain()


def first(conv: Callable[..., nn.Module], block: Callable[[], nn.Module] = Two) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made = block()
        made.conv1 = conv(8, 8, 3, padding=1)
        return made

    return make


def clamping_hook(conv: nn.Module) -> None:
    conv.register_forward_pre_hook(lambda module, args: module.weight.data.clamp_(-0.1, 0.1)[:0].numel() or None)


def tiling(conv: nn.Module) -> None:
    def circular(self: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    conv._conv_forward = types.MethodType(circular, conv)


def hooked(conv: nn.Module) -> None:
    original = conv.forward
    conv.forward = functools.partial(lambda *args, **kwargs: original(*args, **kwargs) * 2)


def stale(conv: nn.Module) -> None:
    conv.out_channels = 6


def tensor_hook(conv: nn.Module) -> None:
    conv.weight.register_hook(lambda grad: grad * 0)


def changed(change: Callable[[nn.Module], None]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        block = Two()
        change(block.conv1)
        return block

    return make


def tied_biases() -> nn.Module:
    block = Two()
    block.conv1.bias = block.conv2.bias
    return block


STATIC = {
    "a scaled weight": (Equalised, "used outside of its own forward"),
    "a weight's sum": (CentralDifference, "used outside of its own forward"),
    "a tied decoder": (TiedDecoder, "used outside of its own forward"),
    "a weight's shape": (AsksTheShape, "used outside of its own forward"),
    "a weight's size": (AsksTheSize, "used outside of its own forward"),
    "a bias": (AddsTheBias, "used outside of its own forward"),
    "a penalty in training": (PenaltyInTraining, "used outside of its own forward"),
    "conv.forward": (CallsForward, "used outside of its own forward"),
    "in a list": (InAList, "holds it elsewhere"),
    "in a dict": (InADict, "holds it elsewhere"),
    "isinstance": (AsksItsClass, "tells it from other modules"),
    "its type": (AsksItsType, "tells it from other modules"),
    "_conv_forward": (changed(tiling), "was replaced on this instance"),
    "forward": (changed(hooked), "was replaced on this instance"),
    "out_channels": (changed(stale), "as its attributes say"),
    "a hook on the weight": (changed(tensor_hook), "hooks on its weight"),
    "tied biases": (tied_biases, "tied"),
    "isinstance, other values": (asking(lambda layer: isinstance(layer, nn.Conv2d)), "tells it from other modules"),
    "its bases": (asking(lambda layer: nn.Conv2d in type(layer).__mro__), "tells it from other modules"),
    "its text": (asking(lambda layer: repr(layer).startswith("Conv2d")), "tells it from other modules"),
    "its package": (asking(lambda layer: type(layer).__module__.startswith("torch.")), "tells it from other modules"),
    "without children": (asking(lambda layer: not list(layer.children())), "tells it from other modules"),
    "its parameters counted": (asking(lambda layer: len(list(layer.parameters())) == 2), "tells it from other modules"),
    "modules counted": (CountsModules, "tells it from other modules"),
    "leaves called": (CallsLeaves, "tells it from other modules"),
    "a weak reference": (ByWeakReference, "holds it elsewhere"),
    "a closure": (ByClosure, "holds it elsewhere"),
    "a global": (InAGlobal, "holds it by a global"),
    "a class with a __call__": (first(OwnCall), "has a __call__ of its own"),
    "a class with a __getattr__": (first(OwnGetattr), "has a __getattr__ of its own"),
    "a method of its class": (first(OwnMethod, AsksForTheGain), "tells it from other modules"),
    "a hook that clamps its weight": (changed(clamping_hook), "a hook on it uses its weight"),
}


@pytest.mark.parametrize("method", ["dynet", "condconv"])
@pytest.mark.parametrize("case", STATIC)
def test_static_with_the_reason(case: str, method: str) -> None:
    block, reason = STATIC[case]
    model = net(block())
    plan, dynamic = convert(model, method)
    assert reason in plan["block.conv1"].reason
    assert type(dynamic.block.conv1) is type(model.block.conv1)
    assert isinstance(dynamic.plain.conv1, DynamicConv)
    assert type(dynamic.block) is type(model.block)


# ---- Converted, each conv by itself or together ----


class Halves(Two):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2)
        return torch.cat([self.conv1(a), self.conv2(b)])


class Groups(Two):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.reshape(n, 2, c // 2, h, w).flatten(0, 1).repeat(1, 2, 1, 1)
        return self.conv2(self.conv1(y)).reshape(n, 2, c, h, w).sum(1)


class Windows(Two):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tiles = x.reshape(n, c, 2, h // 2, w).transpose(1, 2).flatten(0, 1)
        y = self.conv2(self.conv1(tiles))
        return y.reshape(n, 2, c, h // 2, w).transpose(1, 2).reshape(n, c, h, w)


class Flipped(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x).flip(0)).flip(0)


class Rolled(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(x + self.conv1(x).roll(1, 0))


class MixedWithTheMean(Two):
    """No image's own, but the order stays."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(x - self.conv1(x).mean(0, keepdim=True))


class CheckpointInside(Two):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.conv2, self.conv1(x), use_reentrant=False) if x.requires_grad else super().forward(x)


class ByKeyword(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(input=self.conv1(input=x))


class NoneRequired(Two):
    def forward(self, x: Tensor, skip: None = None) -> Tensor:
        return super().forward(x) if skip is None else skip


class KeepsChildren(Two):
    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x * len(list(self.children()))


class FlippedWhereSmall(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x).flip(0)).flip(0) if x.shape[-1] < 10 else super().forward(x)


def flipping_hook() -> nn.Module:
    block = Two()
    block.conv2.register_forward_pre_hook(lambda module, args: (args[0].flip(0),))
    return block


SHARED = {"flips": Flipped, "rolls": Rolled, "halves": Halves, "groups": Groups, "windows": Windows}
SHARED["flips where small"] = FlippedWhereSmall
OWN = {"checkpoint": CheckpointInside, "a hook that flips": flipping_hook}
TOGETHER = {
    "the mean": MixedWithTheMean,
    "keyword": ByKeyword,
    "none": NoneRequired,
    "children": KeepsChildren,
}


@pytest.mark.parametrize("case", [*SHARED, *OWN])
def test_predictors_of_their_own_with_the_reason(case: str) -> None:
    block = (SHARED | OWN)[case]
    plan, dynamic = convert(net(block()))
    assert plan["block.conv2"].convert
    assert plan["block.conv2"].block is None
    assert f"{type(dynamic.block).__name__}: " in plan["block.conv2"].note
    train_and_compare(dynamic)


@pytest.mark.parametrize("case", TOGETHER)
def test_one_predictor(case: str) -> None:
    plan, dynamic = convert(net(TOGETHER[case]()))
    assert plan["block.conv1"].block == plan["block.conv2"].block == "block"
    train_and_compare(dynamic)


def train_and_compare(dynamic: nn.Module) -> None:
    """With coefficients that differ by image, no image takes another's: permuted images give permuted outputs."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in dynamic.named_parameters():
        if "_predictor." in name:
            parameter.data.normal_(generator=generator).mul_(0.5)
    out = dynamic(X)
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in dynamic.parameters() if p.grad is not None)
    again = dynamic(X)
    assert torch.allclose(out, again, rtol=1e-12, atol=1e-12)


def test_coefficients_of_another_batch_are_refused() -> None:
    _, dynamic = convert(net(Two()))
    dynamic.block.conv1.register_forward_pre_hook(lambda conv, args: (torch.cat([args[0], args[0]]),))
    with pytest.raises(Exception, match=r"(?i)images|batch"):
        dynamic(X)


def test_a_conv_outside_of_its_blocks_call_says_so() -> None:
    _, dynamic = convert(net(Two()))
    with pytest.raises(RuntimeError, match="outside of the block's call"):
        dynamic.block.forward(torch.randn(2, 8, 5, 5).double())


def test_after_an_error_nothing_is_handed() -> None:
    _, dynamic = convert(net(Two()))
    with pytest.raises(RuntimeError):
        dynamic.block(torch.randn(2, 5, 5, 5).double())
    with pytest.raises(RuntimeError, match="outside of the block's call"):
        dynamic.block.conv1(torch.randn(2, 8, 5, 5).double())
