"""Weights files: of every kind that people have, and what is said of those that can't be loaded."""

import argparse
import os
import pickle

import pytest
import torch
from nets import equal
from safetensors.torch import save_file

from dyconvert.builtin import DigitsResNet8
from dyconvert.errors import ModelError
from dyconvert.models import build, create, load_state_dict_into, read_state_dict


def wrapped(state_dict, prefix="module."):
    return {prefix + key: tensor for key, tensor in state_dict.items()}


WAYS_TO_SAVE = {
    "plain.pth": torch.save,
    "plain.safetensors": save_file,
    "plain.bin": torch.save,
    "legacy.th": lambda weights, path: torch.save(weights, path, _use_new_zipfile_serialization=False),
    "wrapped.th": lambda weights, path: torch.save(wrapped(weights), path),
    "compiled.safetensors": lambda weights, path: save_file(wrapped(weights, "_orig_mod."), path),
    "both.pt": lambda weights, path: torch.save(wrapped(weights, "module._orig_mod."), path),
    "nested.pth": lambda weights, path: torch.save({"epoch": 3, "state_dict": wrapped(weights)}, path),
    "model.pth": lambda weights, path: torch.save({"model": weights, "optimizer": {"lr": 0.1}}, path),
    "old_pytorch.pth": lambda weights, path: torch.save(
        {key: tensor for key, tensor in weights.items() if "num_batches_tracked" not in key}, path
    ),
}


@pytest.mark.parametrize("name", WAYS_TO_SAVE)
def test_weights_files(name, tmp_path, trained):
    path = tmp_path / name
    WAYS_TO_SAVE[name](trained, path)
    assert read_state_dict(path).keys() <= trained.keys()
    model, source = create("digits-resnet8", weights=str(path))
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], trained[key]) for key in trained if "num_batches" not in key)
    assert source.weights == str(path)
    path.unlink()
    assert build(source).state_dict().keys() == trained.keys()


def test_state_dict_is_preferred_to_its_averages(tmp_path, trained):
    averages = {key: tensor + 1 for key, tensor in trained.items()}
    torch.save({"state_dict_ema": averages, "state_dict": trained}, tmp_path / "ema.pth")
    assert equal(read_state_dict(tmp_path / "ema.pth"), trained)


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("dump", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_code_in_a_weights_file_is_not_run(tmp_path, dump):
    dump({"state_dict": Attack(tmp_path / "ran")}, tmp_path / "attack.pth")
    with pytest.raises(ModelError):
        create("digits-resnet8", weights=str(tmp_path / "attack.pth"))
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Attack(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()  # it would have run


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (DigitsResNet8(), r"run code, here dyconvert\.\S*DigitsResNet8.* save `model.state_dict\(\)`"),
        ({"state_dict": {"a": torch.ones(1)}, "args": argparse.Namespace()}, "run code, here argparse.Namespace"),
        ({"a": torch.ones(1), "epoch": 3}, r"epoch \(int\) aren't tensors"),
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "holds a Tensor"),
        ({}, "holds nothing"),
    ],
)
def test_files_that_hold_something_else(tmp_path, thing, message):
    torch.save(thing, tmp_path / "other.pth")
    with pytest.raises(ModelError, match=message):
        read_state_dict(tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["plain.pth", "legacy.th", "plain.safetensors"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_truncated_files(tmp_path, trained, name, kept):
    path = tmp_path / name
    WAYS_TO_SAVE[name](trained, path)
    contents = path.read_bytes()
    path.write_bytes(contents[: int(kept * len(contents))])
    with pytest.raises(ModelError, match="cut short, damaged"):
        read_state_dict(path)


def test_a_web_page_in_place_of_weights(tmp_path):
    (tmp_path / "page.pth").write_text("<html>Not found</html>")
    with pytest.raises(ModelError, match="damaged"):
        read_state_dict(tmp_path / "page.pth")


@pytest.mark.parametrize("weights", ["absent.pth", "absent.safetensors", "folder/absent"])
def test_missing_weights_files(weights):
    for specifier in ("resnet18", "timm:resnet18", "digits-resnet8"):
        with pytest.raises(ModelError, match=r"no weights file .*absent"):
            create(specifier, weights=weights)


def test_weights_of_another_model():
    model = DigitsResNet8()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    weights = {key: tensor + 1 for key, tensor in before.items() if key != "conv1.weight"}
    weights |= {"fc.weight": torch.zeros(7, 64), "fc.bias": torch.zeros(7), "head": torch.ones(1)}
    with pytest.raises(ModelError) as caught:
        load_state_dict_into(model, weights, "some.pth")
    message = str(caught.value)
    assert "some.pth doesn't fit the model" in message
    assert "1 missing: conv1.weight" in message
    assert "1 unexpected: head" in message
    assert "2 of another shape: fc.weight (file [7, 64], model [10, 64])" in message
    assert equal(model.state_dict(), before)


def test_a_long_mismatch_is_cut(tmp_path, trained):
    torch.save(trained, tmp_path / "digits.pth")
    with pytest.raises(ModelError) as caught:
        create("torchvision:resnet18", weights=str(tmp_path / "digits.pth"))
    message = str(caught.value)
    assert "which has 122 tensors" in message
    assert "missing: layer1.0.conv1.weight, layer1.0.bn1.weight" in message
    assert len(message) < 1500
