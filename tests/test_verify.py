"""verify: compares whatever can be reached, says how much that was, and fails where it was nothing."""

import dataclasses
import random
from collections import UserDict, deque, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from nets import ResidualNet, image, seeded
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

import dyconvert
from dyconvert.differences import compare
from dyconvert.trial import kept

X = image(2, dtype=torch.float64)


@dataclasses.dataclass
class Record:
    logits: Tensor
    extra: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    scores: Tensor


class Instances:
    """As detectors return them: fields in a dict of a plain object, boxes in another object."""

    def __init__(self, scores: Tensor) -> None:
        self._fields = {"scores": scores, "boxes": Slots(scores * 2)}
        self.image_size = (16, 16)


class Slots:
    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Keyless(dict):
    """Registered as diffusers registers its outputs: without keys."""


_pytree.register_pytree_node(Keyless, lambda o: (list(o.values()), list(o)), lambda v, k: Keyless(zip(k, v)))  # noqa: B905


class Registered:
    """A container of a user's own that only the pytree registry can open."""

    def __init__(self, get: Any) -> None:
        self.get = get


_pytree.register_pytree_node(Registered, lambda o: ([o.get()], None), lambda v, _: Registered(lambda: v[0]))

Point = namedtuple("Point", "x y")

# What the net returns instead of its logits, and how many numbers there are in it for each logit.
CONTAINERS = {
    "tensor": (lambda y: y, 1),
    "dataclass": (Record, 1),
    "frozen dataclass": (Frozen, 1),
    "nested": (lambda y: [Record(y, {"more": (Frozen(y), None, "text", 3)})], 2),
    "namedtuple": (lambda y: Point(y, [y]), 2),
    "instances": (Instances, 2),
    "list of instances": (lambda y: [Instances(each) for each in y], 2),
    "slots": (Slots, 1),
    "pytree without keys": (lambda y: Keyless(sample=y), 1),
    "registered pytree": (lambda y: Registered(lambda: y), 1),
    "user dict": (lambda y: UserDict(a=y), 1),
    "deque": (lambda y: deque([y]), 1),
    "generator": (lambda y: (each for each in y), 1),
    "numpy": (lambda y: {"probabilities": y.numpy()}, 1),
    "floats": (lambda y: y.flatten().tolist(), 1),
    "distribution": (lambda y: torch.distributions.Normal(y, y.exp()), 2),
    "complex": (lambda y: torch.complex(y, y), 1),
    "sparse": (lambda y: y.to_sparse(), 1),
    "ragged": (lambda y: torch.nested.as_nested_tensor(list(y)), 1),
}


class Returns(nn.Module):
    """A residual net whose logits are handed back in some container."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.net = ResidualNet()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.net(x))


@pytest.mark.parametrize("name", CONTAINERS)
def test_whatever_holds_the_outputs_is_opened(name):
    wrap, times = CONTAINERS[name]
    model = seeded(Returns, wrap).double()
    dynamic = dyconvert.convert(model, example=X, g=2)
    found = dyconvert.verify(model, dynamic, X)
    assert found.count == times * 2 * 5
    assert found.relative < 1e-12
    assert f"{times * 10} numbers" in str(found)
    with torch.no_grad():
        dynamic.net.head.bias += 0.01
    assert dyconvert.verify(model, dynamic, X).relative > 1e-4


def test_a_transformers_output():
    transformers = pytest.importorskip("transformers")
    outputs = transformers.modeling_outputs
    model = seeded(Returns, lambda y: outputs.ImageClassifierOutput(logits=y)).double()
    found = dyconvert.verify(model, dyconvert.convert(model, example=X), X)
    assert [d.output for d in found.outputs] == ["['logits']"]


@pytest.mark.parametrize(
    "wrap",
    [lambda y: None, lambda y: "text", lambda y: {"shape": y.shape, "n": 3}, lambda y: nn.Linear(2, 2)],
    ids=["nothing", "text", "numbers that are no outputs", "a module"],
)
def test_nothing_in_the_outputs_falls_back_on_the_convs(wrap):
    model = seeded(Returns, wrap).double()
    dynamic = dyconvert.convert(model, example=X)
    found = dyconvert.verify(model, dynamic, X)
    assert found.of_convs
    assert len(found.outputs) == 6
    assert "that convs return" in str(found)
    dynamic.net.layer1[0].conv1.weight.data += 0.01
    assert dyconvert.verify(model, dynamic, X).relative > 1e-3


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda y: y / 0, "is finite"),
        (lambda y: y * float("nan"), "is finite"),
        (lambda y: [y - torch.inf, {"a": y.log() * torch.nan}], "is finite"),
    ],
)
def test_nothing_finite_is_an_error(wrap, said):
    model = seeded(Returns, wrap).double()
    with pytest.raises(dyconvert.ModelError, match=f"{said}.*check=False"):
        dyconvert.convert(model, example=X)
    dynamic = dyconvert.convert(model, example=X, check=False)
    with pytest.raises(dyconvert.ModelError, match=said):
        dyconvert.verify(model, dynamic, X)
    assert compare(model, dynamic, X).count == 0


def test_no_convs_and_nothing_returned_is_an_error():
    class Silent(nn.Module):
        def forward(self, x):
            return "nothing"

    with pytest.raises(dyconvert.ModelError, match="nothing to compare"):
        dyconvert.verify(Silent(), Silent(), X)


def test_what_is_not_finite_on_one_side_only():
    model = seeded(Returns, lambda y: y).double()
    dynamic = dyconvert.convert(model, example=X)
    for net, other in ((model, dynamic), (dynamic, model)):
        net.wrap = lambda y: torch.cat([y, y[:1] / 0])
        other.wrap = lambda y: torch.cat([y, y[:1]])
        assert dyconvert.verify(model, dynamic, X).absolute == float("inf")
    model.wrap = dynamic.wrap = lambda y: torch.cat([y, y[:1] * float("nan")])
    found = dyconvert.verify(model, dynamic, X)
    assert (found.count, found.relative < 1e-12) == (10, True)


def test_different_things_are_an_error():
    model = seeded(Returns, lambda y: y).double()
    dynamic = dyconvert.convert(model, example=X)
    dynamic.wrap = lambda y: [y]
    with pytest.raises(dyconvert.ModelError, match=r"output \[2, 5\] and output\[0\] \[2, 5\]"):
        dyconvert.verify(model, dynamic, X)


class Quirky(ResidualNet):
    """Draws in eval mode, counts, changes buffers and its own mode; its switches return nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(()))
        self.calls, self.seen = 0, []
        self.mine = torch.Generator().manual_seed(3)
        self.pythons = random.Random(3)

    def train(self, mode: bool = True) -> None:
        super().train(mode)
        self.layer1[0].bn1.eval()

    def eval(self) -> None:
        self.train(False)

    def forward(self, x):
        self.calls += 1
        self.seen.append(x.mean())
        self.average.mul_(0.9).add_(0.1)
        x = x + torch.randn(()) + np.random.rand() + random.random() + self.pythons.random()
        x += torch.randn((), generator=self.mine)
        return super().forward(x)


def test_both_run_on_the_same_random_numbers_and_are_left_as_they_were():
    model = Quirky().double()
    model.train()
    other = Quirky().double()
    other.load_state_dict(model.state_dict())
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    x = X.clone()
    assert dyconvert.verify(model, other, x).absolute == 0
    assert torch.equal(x, X)
    assert (torch.get_rng_state() == states[0]).all()
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert (model.calls, model.seen, model.average.item()) == (0, [], 0)
    assert torch.equal(model.mine.get_state(), torch.Generator().manual_seed(3).get_state())
    assert model.training
    assert not model.layer1[0].bn1.training
    assert model.layer1[0].bn2.training


class Merging(nn.Module):
    """Merges a low-rank weight when it goes to eval mode, as loralib does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        if mode == self.merged:
            self.weight.data += -1 if mode else 1
        self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        return x * self.weight.sum()


def test_a_mode_that_does_more_than_switch_is_switched_back():
    model = Merging()
    dyconvert.verify(model, Merging(), X)
    assert (model.training, model.merged, model.weight.tolist()) == (True, False, [1.0] * 3)


def test_kept_after_an_error():
    model = Quirky()

    def run() -> None:
        with kept(model):
            model.new, model.calls = 1, 5
            model.eval()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert (hasattr(model, "new"), model.calls, model.training) == (False, 0, True)


# ---- Gradients ----


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


@pytest.mark.parametrize("method", dyconvert.METHODS)
def test_gradients_of_parameters_and_input(method):
    model = seeded(ResidualNet).double()
    model.head.bias.requires_grad_(False)
    dynamic = dyconvert.convert(model, method=method, g=3)
    found = dyconvert.verify(model, dynamic, X, gradients=True)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [d.output for d in found.gradients] == [*trainable, "input 0"]
    # Every parameter of the static model, so the experts' too; rounding alone.
    assert found.relative < 1e-9
    assert found.count == 10 + X.numel() + sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "of them gradients" in str(found)
    assert all(p.grad is None for net in (model, dynamic) for p in net.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_that_differ_where_outputs_do_not(reentrant):
    class Net(ResidualNet):
        change = staticmethod(lambda x: x)

        def forward(self, x):
            x *= 1.5  # in place: a leaf wouldn't take it
            x = self.change(self.stem(x))
            x = checkpoint(self.layer1, x, use_reentrant=reentrant)
            return self.head(x.flatten(2).mean(2))

    model, other = (seeded(Net).double() for _ in range(2))
    assert dyconvert.verify(model, other, X, gradients=True).relative < 1e-12
    for change in (Reverse.apply, Tensor.detach):
        other.change = change
        assert dyconvert.verify(model, other, X).relative == 0
        assert dyconvert.verify(model, other, X, gradients=True).relative > 0.1


def test_the_command_line_says_how_much_was_compared(cli):
    done = cli("convert", "digits-resnet8")
    assert (done.code, "absolute, of 20 numbers" in done.said) == (0, True), done.said


class MakesAPartLate(nn.Module):
    """Its second conv is made by its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.late = nn.Conv2d(3, 4, 1), None

    def forward(self, x: Tensor) -> Tensor:
        if self.late is None:
            self.late = nn.Conv2d(4, 4, 1)
        return self.late(self.first(x))


def test_parts_that_a_forward_makes_are_taken_away_again() -> None:
    model = MakesAPartLate()
    dyconvert.verify(model, model, torch.randn(1, 3, 4, 4))
    assert model.late is None
    assert [name for name, _ in model.named_children()] == ["first"]
