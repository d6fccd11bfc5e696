"""Checkpoints that earlier versions wrote load, and compute what they computed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saved_nets import OUTPUTS, SAVED, images
from torch import nn

import dyconvert
from dyconvert.nn import DynamicConv

FOLDER = Path(__file__).parent / "data" / "saved" / "0.1"
# Of one float32 rounding a layer and more: another version of torch may sum in another order.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def check(name: str, model: nn.Module) -> None:
    kept = load_file(FOLDER / name / OUTPUTS)["outputs"]
    with torch.no_grad():
        found = model(images(name, kept.dtype))
    tolerance = TOLERANCE[kept.dtype]
    torch.testing.assert_close(found, kept, rtol=tolerance, atol=tolerance * kept.abs().max().item())


@pytest.mark.parametrize("name", SAVED)
def test_saved_by_version_0_1(name):
    architecture, _ = SAVED[name]
    check(name, dyconvert.load(FOLDER / name, architecture().eval()))


def test_it_is_saved_again(tmp_path):
    architecture, _ = SAVED["densenet-dynet"]
    dyconvert.save(dyconvert.load(FOLDER / "densenet-dynet", architecture()), tmp_path / "again")
    check("densenet-dynet", dyconvert.load(tmp_path / "again", architecture()))


def test_with_a_source():
    model = dyconvert.load(FOLDER / "builtin")
    assert any(isinstance(module, DynamicConv) for module in model.modules())
    check("builtin", model)
