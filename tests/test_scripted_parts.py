"""Models with parts that torch.jit has scripted or traced: those stay as they are, and belong to the copy."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from varied import randomised

import dyconvert

# Rounding alone.
FLOAT64 = 1e-12


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class Net(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        part = Part().double().eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            example = torch.zeros(1, 4, 6, 6, dtype=torch.float64)
            self.part = torch.jit.script(part) if how == "scripted" else torch.jit.trace(part, example)
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.c = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.part(self.a(x))))


def built(how: str) -> nn.Module:
    torch.manual_seed(0)
    return Net(how).double().eval()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_the_copy_trains_parts_of_its_own(how: str, tmp_path: Path) -> None:
    model = built(how)
    before = copy.deepcopy(model.state_dict())
    dynamic = dyconvert.convert(model, example=images(1))
    assert sum(isinstance(m, dyconvert.DynamicConv) for m in dynamic.modules()) == 2
    assert dyconvert.verify(model, dynamic, images()).relative < FLOAT64
    dynamic(images()).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for name, p in dynamic.named_parameters() if name.startswith("part."))
    with torch.no_grad():
        for parameter in randomised(dynamic).parameters():
            parameter.mul_(1.1)
        expected = dynamic(images())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    dyconvert.save(dynamic, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(dyconvert.load(tmp_path / "saved", built(how)).eval()(images()), expected)


def test_narrowing_refuses_them_by_name() -> None:
    with pytest.raises(dyconvert.ModelError, match="part is a ScriptModule"):
        dyconvert.narrow(built("scripted"), width=0.5, example=images(1))
