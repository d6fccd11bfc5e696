"""Models that are torch.fx graphs, such as torchvision's feature extractors: converted, copied, saved, switched."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor
from varied import randomised

import dyconvert

# Rounding alone.
FLOAT64 = 1e-12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.bn1(self.conv1(x)).relu())


class Net(nn.Module):
    """It has a head that runs in training only, so that the two modes' graphs differ."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block()
        self.last = nn.Conv2d(8, 8, 1)
        self.aux = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        if self.training:
            x = x + self.aux(x)
        return self.last(x)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double().eval()


def traced() -> nn.Module:
    return fx.symbolic_trace(net()).eval()


def extractor() -> nn.Module:
    nodes = {"block": "middle", "last": "end"}
    return create_feature_extractor(net(), nodes).eval()


GRAPHS = {"traced": traced, "feature extractor": extractor}


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


def apart(a: object, b: object) -> float:
    a, b = (list(t.values()) if isinstance(t, dict) else [t] for t in (a, b))
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", GRAPHS)
def test_converted_in_both_modes(kind: str) -> None:
    model = GRAPHS[kind]()
    dynamic = dyconvert.convert(model, example=images(1))
    assert sum(isinstance(m, dyconvert.DynamicConv) for m in dynamic.modules()) >= 3
    for training in (False, True, False):
        model.train(training), dynamic.train(training)
        with torch.no_grad():
            assert apart(model(images()), dynamic(images())) < FLOAT64


@pytest.mark.parametrize("kind", GRAPHS)
def test_copies_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    dynamic = randomised(dyconvert.convert(GRAPHS[kind](), example=images(1))).eval()
    dyconvert.save(dynamic, tmp_path / "saved")
    loaded = dyconvert.load(tmp_path / "saved", GRAPHS[kind]()).eval()
    with torch.no_grad():
        expected = dynamic(images())
        for other in (copy.deepcopy(dynamic), copy.deepcopy(copy.deepcopy(dynamic)), loaded):
            other.eval()  # a deep copy of torchvision's extractor is in training mode
            assert apart(expected, other(images())) == 0


def test_features_of_a_converted_model() -> None:
    model = net()
    dynamic = dyconvert.convert(model, example=images(1))
    nodes = {"block": "middle", "last": "end"}
    static, dynamic = (create_feature_extractor(m, nodes).eval() for m in (model, dynamic))
    for training in (False, True):
        static.train(training), dynamic.train(training)
        with torch.no_grad():
            assert apart(static(images()), dynamic(images())) < FLOAT64


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", GRAPHS)
def test_what_looks_at_a_model_leaves_its_mode(kind: str, training: bool) -> None:
    model = GRAPHS[kind]().train(training)
    other = GRAPHS[kind]().train(training)
    dynamic = dyconvert.convert(model, example=images(1))
    dyconvert.verify(model, dynamic, images())
    for each in (model, dynamic):
        assert each.training == training
        assert all(m.training == training for m in each.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d))
    with torch.no_grad():
        assert apart(model(images()), other(images())) == 0
        assert apart(dynamic(images()), other(images())) < FLOAT64
