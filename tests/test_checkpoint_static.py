"""save and load of models without dynamic convs, and of narrowed ones."""

import json

import pytest
import torch
from nets import ResidualNet, image, listed, outputs, same, seeded
from torch import nn

import dyconvert
from dyconvert import CheckpointError, ModelError, models
from dyconvert.marks import mark_narrowing
from dyconvert.narrowing.record import Narrowing, changes


def narrowed_by_hand(net: nn.Module) -> nn.Module:
    """`ResidualNet` of half the width, as if it had been narrowed."""
    narrow = seeded(ResidualNet, width=4, seed=3)
    narrowing = Narrowing(model="ResidualNet", width=0.5, init="l1", modules=changes(net, narrow))
    mark_narrowing(narrow, narrowing)
    return narrow


def test_a_static_model(tmp_path, net):
    assert listed(dyconvert.save(net, tmp_path / "saved", static=True)) == [
        "README.md",
        "dyconvert.json",
        "model.safetensors",
    ]
    loaded = dyconvert.load(tmp_path / "saved", seeded(ResidualNet, seed=1))
    assert same(loaded, net)
    assert not loaded.training
    assert torch.equal(outputs(loaded, image()), outputs(net, image()))


def test_a_static_model_with_a_source(tmp_path):
    static, source = models.create("digits-resnet8")
    dyconvert.save(static, tmp_path / "saved", source=source, static=True)
    loaded = dyconvert.load(tmp_path / "saved")
    assert type(loaded) is type(static)
    assert same(loaded, static)


def test_static_means_a_model_not_a_wrapper(tmp_path, net):
    with pytest.raises(ModelError, match=r"isn't what dyconvert\.convert"):
        dyconvert.save(nn.DataParallel(dyconvert.convert(net)), tmp_path / "saved", static=True)


def test_a_dynamic_model_keeps_its_plan(tmp_path, net):
    dynamic = dyconvert.convert(net)
    dyconvert.save(dynamic, tmp_path / "saved", static=True)
    assert same(dyconvert.load(tmp_path / "saved", net), dynamic)


@pytest.mark.parametrize("convert", [False, True])
def test_a_narrowed_model(convert, tmp_path, net):
    narrow = narrowed_by_hand(net)
    if convert:
        narrow = dyconvert.convert(narrow, g=3)
    dyconvert.save(narrow, tmp_path / "saved")
    loaded = dyconvert.load(tmp_path / "saved", net)
    assert same(loaded, narrow)
    assert torch.equal(outputs(loaded, image()), outputs(narrow, image()))
    assert loaded.layer1[0].conv1.out_channels == 4
    assert net.stem.out_channels == 8
    # Saved again, and loaded from the original architecture again.
    assert same(dyconvert.load(dyconvert.save(loaded, tmp_path / "again"), net), narrow)


def test_collapsed_it_is_still_narrow(tmp_path, net):
    narrow = narrowed_by_hand(net)
    collapsed = dyconvert.collapse(dyconvert.convert(narrow))
    loaded = dyconvert.load(dyconvert.save(collapsed, tmp_path / "saved"), net)
    assert same(loaded, collapsed)


@pytest.mark.parametrize("model", [lambda: nn.Conv2d(3, 3, 1), lambda: ResidualNet(dims=1)])
def test_another_architecture(model, tmp_path, net):
    dyconvert.save(narrowed_by_hand(net), tmp_path / "saved")
    with pytest.raises(CheckpointError, match="isn't the one that was saved"):
        dyconvert.load(tmp_path / "saved", model())


def test_an_altered_narrowing(tmp_path, net):
    dyconvert.save(narrowed_by_hand(net), tmp_path / "saved")
    file = tmp_path / "saved" / "dyconvert.json"
    content = json.loads(file.read_text())
    content["narrowing"]["modules"][0]["attributes"]["out_channels"] = 5
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"narrowing .*altered"):
        dyconvert.load(tmp_path / "saved", net)


def test_a_save_from_before_there_was_narrowing(tmp_path, net):
    dynamic = dyconvert.convert(net)
    file = dyconvert.save(dynamic, tmp_path / "saved") / "dyconvert.json"
    content = json.loads(file.read_text())
    del content["narrowing"], content["narrowing_sha256"]
    file.write_text(json.dumps(content))
    assert same(dyconvert.load(tmp_path / "saved", net), dynamic)
