"""`dyconvert MODEL --width ...`: what it prints, saves and refuses."""

import json

import pytest
import torch
from nets import listed
from torch import nn
from torchvision.utils import save_image

import dyconvert

pytest.importorskip("torch_pruning")


@pytest.fixture
def folder(cli, tmp_path) -> str:
    """A folder of images in two classes, in the folder that `cli` runs in."""
    generator = torch.Generator().manual_seed(0)
    for number in range(8):
        place = tmp_path / "images" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, 20, 20, generator=generator), place / f"{number}.png")
    return "images"


def test_the_built_in_model(cli, tmp_path):
    ran = cli("digits-resnet8", "--width", 0.5, "--data", "digits", "--g", 2)
    assert ran.code == 0, ran.stderr
    assert "narrowed, weights by least-squares" in ran.said
    assert "the outputs' error on 72 held-out images: 0." in ran.said
    assert "error of each layer on held-out images: " in ran.said
    assert "method dynet, g = 2" in ran.said
    assert "it needs fine-tuning" in ran.said
    assert listed(tmp_path) == ["digits-resnet8-width0.5-dynet-g2"]
    loaded = dyconvert.load(tmp_path / "digits-resnet8-width0.5-dynet-g2")
    assert loaded.dyconvert_narrowing.width == 0.5


@pytest.mark.parametrize("init", [None, "least-squares", "l1"])
def test_a_static_model_of_ones_own(init, cli, models_file, folder, tmp_path):
    options = ["--init", init] if init else []
    options += ["--data", folder, "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"] if init else []
    ran = cli(f"{models_file}:net", "--flops", 0.4, "--static", "--input-size", 16, "--json", *options)
    assert ran.code == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert result["narrowing"]["init"] == (init or "merge")
    assert result["plan"] is None
    before, after = result["macs"]
    assert after <= 0.4 * before
    loaded = dyconvert.load(tmp_path / result["output"], trust_code=True)
    assert result["output"] == "net-flops0.4-static"
    assert type(loaded.layer1[0].conv1) is nn.Conv2d


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--width", 0], "0 < width <= 1"),
        (["--flops", 0.0001], "can't be reached"),
        (["--width", 0.5, "--init", "least-squares"], "--data"),
        (["--width", 0.5, "--data", "nowhere"], "nowhere is no folder"),
        (["--width", 0.5, "--dry-run"], "--dry-run shows the conversion alone"),
        (["--data", "digits"], "--data is for narrowing"),
        (["--static"], "--static is for narrowing"),
        (["--width", 0.5, "--keep", "nothing"], "'nothing'"),
    ],
)
def test_bad_input(options, says, cli, models_file, tmp_path):
    before = listed(tmp_path)
    ran = cli(f"{models_file}:net", "--input-size", 16, *options)
    assert ran.code == 2
    assert says in ran.said
    assert listed(tmp_path) == before
