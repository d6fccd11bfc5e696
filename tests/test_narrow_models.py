"""Narrowing the models of libraries: how many multiply-adds are left, and that everything after it still works."""

import copy
import pickle

import pytest
import torch
import torchvision
from torch import Tensor, nn

import dyconvert
from dyconvert.analysis.flops import macs

pytest.importorskip("torch_pruning")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "fcn_resnet50":
        return torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None).eval()
    options = {"init_weights": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, **options).eval()


def tensors(output: object) -> list[Tensor]:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
    return [value for value in values if value is not None]


# The largest share of the original's multiply-adds; at 224 px, as the papers count.
BARS = [
    ("resnet18", {"width": 0.5}, 0.318),
    ("mobilenet_v2", {"flops": 0.433}, 0.433),
    pytest.param("shufflenet_v2_x1_0", {"flops": 0.6}, 0.6, marks=pytest.mark.sweep),
    pytest.param("resnet50", {"width": 0.5}, 0.277, marks=pytest.mark.sweep),
    pytest.param("fcn_resnet50", {"width": 0.5}, 0.31, marks=pytest.mark.sweep),
]


@pytest.mark.parametrize(("name", "target", "bar"), BARS)
def test_multiply_adds(name, target, bar):
    model = build(name)
    x = torch.zeros(1, 3, 224, 224)
    assert macs(dyconvert.narrow(model, example=x, static=True, **target), x) <= bar * macs(model, x)


OTHERS = ["mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf", "densenet121", "googlenet", "convnext_tiny"]


@pytest.mark.parametrize(
    "name",
    [
        "shufflenet_v2_x1_0",
        *(pytest.param(name, marks=pytest.mark.sweep) for name in ["resnet50", "fcn_resnet50", *OTHERS]),
    ],
)
def test_narrows_runs_trains_saves_and_loads(name, tmp_path):
    model = build(name)
    x = torch.randn(8, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    narrow = dyconvert.narrow(model, width=0.5, data=x, g=2)
    assert type(narrow) is type(model)
    optimizer = torch.optim.SGD(narrow.parameters(), lr=1e-4)
    loss = sum(t.square().mean() for t in tensors(narrow.train()(x[:2])))
    loss.backward()
    assert all(p.grad is not None for p in narrow.parameters())
    optimizer.step()
    narrow.eval()
    dyconvert.save(narrow, tmp_path / "saved")
    for again in (dyconvert.load(tmp_path / "saved", model), copy.deepcopy(narrow), pickle.loads(pickle.dumps(narrow))):
        with torch.no_grad():
            pairs = zip(tensors(again(x[:2])), tensors(narrow(x[:2])), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.sweep
def test_a_narrowed_resnet50_exports(tmp_path):
    pytest.importorskip("onnxruntime")
    model = build("resnet50")
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    narrow = dyconvert.narrow(model, width=0.5, example=x)
    # Both compare what the file computes with what the model does.
    assert dyconvert.export_onnx(narrow, tmp_path / "narrow.onnx", x).difference < 1e-4
    assert dyconvert.export_torch(narrow, tmp_path / "narrow.pt2", x).difference < 1e-4
