"""The model card: what it says, and whose it is."""

import json

import pytest
import torch
import yaml
from nets import ResidualNet, image, listed, seeded, trained

import dyconvert
from dyconvert import models
from dyconvert.checkpoint.card import CARD, is_own, licence_of
from dyconvert.console import count


def header(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_what_it_says(cli, tmp_path):
    assert cli("digits-resnet8", "-o", "saved", "-q").code == 0
    text = (tmp_path / "saved" / CARD).read_text()
    assert header(text) == {
        "library_name": "dyconvert",
        "tags": ["dynamic-convolution", "dynet"],
        "pipeline_tag": "image-classification",
        "license": "apache-2.0",
    }
    assert "# builtin:digits-resnet8, dynet, g = 6" in text
    assert "| accuracy on 360 test digits | 99.72 | 99.72 |" in text
    assert "| parameters | 77.75 k | 510.27 k |" in text
    assert "| MACs, one image |" in text
    assert 'dyconvert.load("saved")' in text
    assert "dyconvert.preprocessing(model)" in text


@pytest.mark.parametrize("method", ["dynet", "condconv", "dyconv"])
def test_the_parameters_of_the_original(method, tmp_path):
    net = seeded(ResidualNet)
    dyconvert.save(dyconvert.convert(net, method=method, g=3, example=image()), tmp_path / "saved")
    text = (tmp_path / "saved" / CARD).read_text()
    assert f"| parameters | {count(sum(p.numel() for p in net.parameters()))} |" in text


def test_what_a_user_wrote_stays(tmp_path):
    model = trained(seeded(ResidualNet), g=2)
    directory = tmp_path / "saved"
    directory.mkdir()
    (directory / CARD).write_text("# My project\n")
    dyconvert.save(model, directory, force=True)
    assert (directory / CARD).read_text() == "# My project\n"
    # One of ours is replaced, as long as nobody edited it.
    (directory / CARD).unlink()
    dyconvert.save(model, directory, figures={"top-1, %": (80.0, 81.25)})
    assert "| top-1, % | 80.00 | 81.25 |" in (directory / CARD).read_text()
    dyconvert.save(model, directory, figures={"top-1, %": (80.0, 82.5)})
    text = (directory / CARD).read_text()
    assert "82.50" in text
    (directory / CARD).write_text(text.replace("82.50", "99.99"))
    dyconvert.save(model, directory)
    assert "99.99" in (directory / CARD).read_text()
    assert is_own(text)
    assert len(listed(directory)) == 3


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "outside").write_text("not yours")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / CARD).symlink_to(tmp_path / "outside")
    dyconvert.save(trained(seeded(ResidualNet), g=2), tmp_path / "saved", force=True)
    assert (tmp_path / "outside").read_text() == "not yours"


def test_names_that_are_markup(tmp_path):
    source = models.Source("x`|<script>\n---\nlicense: mit:f", {}, 'a\n"b|c', None)
    dyconvert.save(trained(seeded(ResidualNet), g=2), tmp_path / "saved", source=source)
    text = (tmp_path / "saved" / CARD).read_text()
    assert "<script" not in text
    assert header(text) == {"library_name": "dyconvert", "tags": ["dynamic-convolution", "dynet"]}
    assert is_own(text)


@pytest.mark.parametrize(
    ("specifier", "weights", "licence"),
    [
        ("torchvision:resnet18", "IMAGENET1K_V1", {"license": "bsd-3-clause"}),
        ("torchvision:regnet_y_16gf", "IMAGENET1K_SWAG_E2E_V1", {"license": "other"}),
        ("torchvision:resnet18", "/home/me/weights.pth", None),
        ("torchvision:resnet18", None, None),
        ("torchvision:nothing", "IMAGENET1K_V1", None),
        ("timm:resnet18", "a1_in1k", {"license": "apache-2.0"}),
        ("timm:nothing", "a1_in1k", None),
        ("mine.py:net", "x", None),
        ("builtin:digits-resnet8", "default", {"license": "apache-2.0"}),
    ],
)
def test_licences(specifier, weights, licence):
    if specifier.startswith("timm"):
        pytest.importorskip("timm")
    found = licence_of(models.Source(specifier, {}, weights, None))
    assert (found and {"license": found["license"]}) == licence


def test_a_fine_tuned_model_says_what_it_reached(cli, tmp_path):
    pytest.importorskip("lightning")
    short = ["train.epochs=1", "pretrain=null", "data.workers=0", "train.accelerator=cpu", "train.devices=1"]
    assert cli("finetune", "quickstart", *short, "output.directory=run", "-q", "--trust-code").code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for place, reached in (("run", summary["best"]), ("run/last", summary["finetuned"])):
        text = (tmp_path / place / CARD).read_text()
        assert f"| top-1, % | {summary['original']:.2f} | {reached:.2f} |" in text
        assert "parameters" in text


def test_a_compressed_model(tmp_path):
    model = dyconvert.compress(trained(seeded(ResidualNet, 32), g=2), example=torch.zeros(1, 3, 16, 16))
    dyconvert.save(model, tmp_path / "saved")
    assert "compressed to int8" in (tmp_path / "saved" / CARD).read_text()
