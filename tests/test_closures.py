"""Functions that a model holds and that know its parts: the converted model's know the converted model's."""

import copy
import functools
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


KINDS = [KnowsTheModel, KnowsTheConv, KnowsAMethod, HasADefault, CallsAnother, CallsItself, Partial, InAnObject, Counts]


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
