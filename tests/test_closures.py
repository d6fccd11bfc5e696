"""Functions that a model holds and that know its parts: the converted model's know the converted model's."""

import copy
import functools
import types
import weakref
from collections import deque, namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from varied import randomised

import dyconvert

# Rounding alone.
FLOAT64 = 1e-12


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.run = self.made()

    def made(self) -> Callable[[Tensor], Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.run(self.stem(x)))


class KnowsTheModel(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        return lambda x: self.a(x).relu()


class KnowsTheConv(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        conv = self.a
        return lambda x: conv(x).relu()


class KnowsAMethod(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        forward = self.a.forward
        return lambda x: forward(x).relu()


class HasADefault(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor, conv: nn.Module = self.a, *, scale: float = 2.0) -> Tensor:
            return conv(x) * scale

        return run


class CallsAnother(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        layers = [self.a, nn.ReLU()]

        def first(x: Tensor) -> Tensor:
            return layers[0](x)

        return lambda x: layers[1](first(x))


class CallsItself(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor, depth: int = 1) -> Tensor:
            return run(self.a(x).tanh(), depth - 1) if depth else x.sin()

        return run


class Partial(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        return functools.partial(lambda scale, x: self.a(x) * scale, 0.5)


class Helper:
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        self.steps = {"only": [run]}

    def __call__(self, x: Tensor) -> Tensor:
        return self.steps["only"][0](x)


class InAnObject(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        return Helper(lambda x: self.a(x).relu())


class InATuple(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        self.steps = (lambda x: self.a(x).relu(), torch.tanh)
        return lambda x: self.steps[1](self.steps[0](x))


class InANamedTuple(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        self.steps = namedtuple("Steps", "first last")(lambda x: self.a(x).relu(), torch.tanh)
        return lambda x: self.steps.last(self.steps.first(x))


class InASet(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        self.steps = {lambda x: self.a(x).relu()}
        return lambda x: next(iter(self.steps))(x)


class InADeque(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        self.steps = deque([lambda x: self.a(x).relu()])
        return lambda x: self.steps[0](x)


class Slotted:
    __slots__ = ("run",)

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        self.run = run


class InASlot(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        self.slotted = Slotted(lambda x: self.a(x).relu())
        return lambda x: self.slotted.run(x)


class PartialOfAFunction(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        return functools.partial(lambda inner, x: inner(x).relu(), lambda x: self.a(x))


class Holder:
    def __init__(self, conv: nn.Module) -> None:
        self.conv = conv


class OnlyAFunctionKnowsTheHolder(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        holder = Holder(self.a)
        return lambda x: holder.conv(x).relu()


class WeakReference(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        self.known = {"model": weakref.ref(self)}
        return lambda x: self.known["model"]().a(x).relu()


class WeakProxy(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        self.known = [weakref.proxy(self)]
        return lambda x: self.known[0].a(x).relu()


class WeakMethod(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        self.known = (weakref.WeakMethod(self.activated),)
        return lambda x: self.known[0]()(x)

    def activated(self, x: Tensor) -> Tensor:
        return self.a(x).relu()


class Cached(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        self.chosen = functools.cache(lambda: self.a)
        return lambda x: self.chosen()(x).relu()


class PatchedByAMethod(Base):
    """As libraries replace a forward: a function that knows the old one, bound to the module."""

    def made(self) -> Callable[[Tensor], Tensor]:
        before = self.a.forward
        self.a.forward = types.MethodType(lambda conv, x: before(x) * conv.stride[0], self.a)  # type: ignore[method-assign]
        return lambda x: self.a(x).relu()


class KnowsATensorsMethod(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        self.times = self.a.weight.mul
        return lambda x: torch.conv2d(x, self.times(2.0), self.a.bias, padding=1).relu()


class Counts(Base):
    """Two functions share what they count."""

    def made(self) -> Callable[[Tensor], Tensor]:
        calls = 0

        def run(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return self.a(x) * 0.5

        self.calls = lambda: calls
        return run


KINDS = [kind for kind in list(globals().values()) if isinstance(kind, type) and issubclass(kind, Base)]
KINDS.remove(Base)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


def built(kind: type[Base]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_trains_and_saves_what_it_computes_with(kind: type[Base], tmp_path: Path) -> None:
    model = built(kind)
    before = copy.deepcopy(model.state_dict())
    dynamic = dyconvert.convert(model, example=images(1))
    assert dyconvert.verify(model, dynamic, images()).relative < FLOAT64
    dynamic(images()).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert dynamic.a.weight.grad is not None
    randomised(dynamic)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    dyconvert.save(dynamic, tmp_path / "saved")
    loaded = dyconvert.load(tmp_path / "saved", built(kind)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images()), dynamic(images()))


def test_what_functions_share_stays_shared() -> None:
    model = built(Counts)
    dynamic = dyconvert.convert(model, example=images(1))
    before = dynamic.calls()
    dynamic(images())
    assert (dynamic.calls(), model.calls()) == (before + 1, 0)


KNOWN: list[nn.Module] = []


class InAGlobal(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        return lambda x: KNOWN[0].a(x).relu()


class NeverCopied:
    def __init__(self, conv: nn.Module) -> None:
        self.conv = conv

    def __deepcopy__(self, memo: object) -> "NeverCopied":
        return self


class InAnObjectThatIsNotCopied(Base):
    def made(self) -> Callable[[Tensor], Tensor]:
        self.held = NeverCopied(self.a)
        return lambda x: self.held.conv(x).relu()


@pytest.mark.parametrize("kind", [InAGlobal, InAnObjectThatIsNotCopied])
def test_what_no_copy_can_follow_stays_static_and_says_so(kind: type[Base]) -> None:
    model = built(kind)
    KNOWN[:] = [model]
    plan = dyconvert.plan(model, example=images(1))
    (entry,) = [entry for entry in plan.convs if entry.name == "a"]
    assert "isn't copied with the model" in entry.reason
    dynamic = dyconvert.convert(model, plan)
    assert dyconvert.verify(model, dynamic, images()).relative < FLOAT64
