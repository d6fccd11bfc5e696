"""predict: images prepared as the model's library or recipe does, classes by their names."""

import json
import os

import numpy as np
import pytest
import torch
from hostile_images import png
from nets import ResidualNet, listed, seeded
from PIL import Image

import dyconvert
from dyconvert import ModelError, Preprocessing, models
from dyconvert.models.preprocess import preprocessing_for

pytestmark = pytest.mark.usefixtures("no_downloads")


def picture(width=70, height=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny"])
@pytest.mark.parametrize("size", [(70, 50), (300, 400), (224, 224)])
def test_torchvisions_own_transforms(name, size):
    from torchvision.models import get_model_weights

    weights = get_model_weights(name).DEFAULT
    ours = preprocessing_for(models.Source(f"torchvision:{name}", {}, weights.name, (3, 224, 224)))
    assert torch.allclose(ours(picture(*size)), weights.transforms()(picture(*size)), atol=1e-6)  # one division
    assert ours.classes == tuple(weights.meta["categories"])


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "mobilenetv3_small_100", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("size", [(70, 50), (300, 400), (224, 224)])
def test_timms_own_transforms(name, size):
    timm = pytest.importorskip("timm")
    from timm.data import create_transform, resolve_data_config

    model, source = models.create(f"timm:{name}", "none")
    ours = preprocessing_for(source)
    theirs = create_transform(**resolve_data_config(timm.get_pretrained_cfg(name).to_dict(), model=model))
    assert torch.allclose(ours(picture(*size)), theirs(picture(*size)), atol=1e-6)
    assert ours.class_name(0) == "tench"


@pytest.mark.parametrize("change", [[], ["data.resize=40"], ["data.size=24", "model.input_size=[3,24,24]"]], ids=str)
def test_a_recipes_validation_images(change, tmp_path):
    pytest.importorskip("lightning")
    from dyconvert.finetuning.data.augment import preprocessing_of_data
    from dyconvert.finetuning.data.datasets import load_split
    from dyconvert.finetuning.data.loading import Prepared

    for number, size in enumerate([(32, 32), (50, 60), (24, 24)]):
        for part in ("train", "val"):
            folder = tmp_path / part / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            picture(*size, seed=number).save(folder / f"{number}.png")
    recipe = dyconvert.load_recipe(
        "cifar10-resnet20", [f"data.root={tmp_path}", "model.weights=none", "model.num_classes=2", *change]
    )
    part = load_split(recipe, "val", 2, lambda line: None)
    prepared = Prepared(part, 0, recipe.data, training=False)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (recipe.data.mean, recipe.data.std))
    ours = preprocessing_of_data(recipe, part.images.classes)
    for position in range(len(part)):
        images, _ = prepared.collate(prepared.__getitems__([(0, position)]))
        file = part.images._samples[int(part.chosen[position])][0]
        expected = ((images[0] / 255 if images.dtype == torch.uint8 else images[0]) - mean) / std
        assert torch.allclose(ours(file), expected, atol=1e-5)
    assert ours.classes == ("a", "b")


def test_saved_and_loaded(tmp_path):
    wanted = Preprocessing(size=(3, 16, 16), resize=18, mean=(0.5,) * 3, std=(0.5,) * 3, classes=("猫", "=cmd", "c"))
    model = dyconvert.convert(seeded(ResidualNet), g=2)
    with pytest.raises(ModelError, match="doesn't say how its images"):
        dyconvert.preprocessing(model)
    dyconvert.save(model, tmp_path / "with", preprocessing=wanted)
    loaded = dyconvert.load(tmp_path / "with", seeded(ResidualNet))
    assert dyconvert.preprocessing(loaded) == dyconvert.preprocessing(model) == wanted
    dyconvert.save(loaded, tmp_path / "again")  # what was loaded with it keeps it
    assert dyconvert.preprocessing(dyconvert.load(tmp_path / "again", seeded(ResidualNet))) == wanted
    dyconvert.save(dyconvert.convert(seeded(ResidualNet), g=2), tmp_path / "without")
    assert "preprocessing" not in json.loads((tmp_path / "without" / "dyconvert.json").read_text())


@pytest.mark.parametrize(
    "given", [{"size": (2, 8, 8)}, {"size": (3, 8, 8), "std": (0.0,) * 3}, {"size": (3, 8, 8), "mean": (0.5,)}], ids=str
)
def test_preprocessing_that_is_refused(given):
    with pytest.raises(ValueError, match=r"channels|std"):
        Preprocessing(**given)


def test_the_command(cli, tmp_path):
    assert cli("digits-resnet8", "-o", "digits", "-q").code == 0
    images, labels = dyconvert.builtin.load_digits_test()
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        pixels = (images[number, 0] * 255).round().byte()
        Image.fromarray(pixels.numpy()).save(tmp_path / "pictures" / f"{number:02}.png")
    before = listed(tmp_path)
    ran = cli("predict", "digits", "pictures", "--json")
    assert ran.code == 0, ran.said
    found = json.loads(ran.stdout)["predictions"]
    assert [each["image"] for each in found] == [str(tmp_path / "pictures" / f"{n:02}.png") for n in range(12)] or [
        each["image"] for each in found
    ] == [f"pictures/{n:02}.png" for n in range(12)]
    right = [each["classes"][0]["name"] == str(int(label)) for each, label in zip(found, labels, strict=False)]
    assert sum(right) >= 11  # the model has 97 %
    for each in found:
        probabilities = [row["probability"] for row in each["classes"]]
        assert len(probabilities) == 5
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1 + 1e-6
    said = cli("predict", "digits", "pictures/00.png", "--top", 2).stdout
    assert "pictures/00.png" in said
    assert f" {found[0]['classes'][0]['name']}" in said
    assert len(said.strip().splitlines()) == 3
    assert listed(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["predict", "digits", "none.png"], "There is no image none.png"),
        (["predict", "digits", "text.png"], "can't be read as an image"),
        (["predict", "digits", "empty"], "holds no images"),
        (["predict", "nothing", "a.png"], "no dyconvert.json"),
        (["predict", "mine", "a.png", "--trust-code"], "--input-size 3,224,224"),
        (["predict", "digits", "a.png", "--mean", "1,2"], "mean and std need a number"),
        (["predict", "digits"], "IMAGE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input(arguments, says, cli, models_file, tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "empty").mkdir()
    if "mine" in arguments:
        assert cli(f"{models_file}:net", "--input-size", 16, "-o", "mine").code == 0
    elif arguments[1] == "digits":
        assert cli("digits-resnet8", "-o", "digits", "-q").code == 0
    ran = cli(*arguments)
    assert ran.code == 2
    assert says in ran.said, ran.said


def test_a_model_of_ones_own(cli, models_file, tmp_path):
    picture().save(tmp_path / "a.png")
    assert cli(f"{models_file}:net", "--input-size", 16, "-o", "mine").code == 0
    ran = cli("predict", "mine", "a.png", "--trust-code", "--input-size", 16, "--json")
    assert ran.code == 0, ran.said
    assert json.loads(ran.stdout)["predictions"][0]["classes"][0]["name"].isdigit()


def test_a_fine_tuned_model_knows_its_classes(cli):
    pytest.importorskip("lightning")
    short = ["train.epochs=1", "pretrain=null", "data.workers=0", "train.accelerator=cpu", "train.devices=1"]
    assert cli("finetune", "quickstart", *short, "output.directory=run", "-q", "--trust-code").code == 0
    for place in ("run", "run/last"):
        found = dyconvert.preprocessing(dyconvert.load(place, trust_code=True))
        assert found.classes == tuple("0123456789")
        assert found.size == (1, 8, 8)


def test_grey_images_of_16_bits_keep_their_range(tmp_path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    for channels in (1, 3):
        prepare = Preprocessing(size=(channels, 8, 8), mean=(0.0,) * channels, std=(1.0,) * channels)
        for given in (tmp_path / "ramp.png", Image.open(tmp_path / "ramp.png")):
            found = prepare(given)
            assert found.shape == (channels, 8, 8)
            assert torch.allclose(found[0], torch.from_numpy(ramp.astype(np.float32)) / 65535, atol=1 / 255)


@pytest.mark.parametrize("size", [(60_000, 60_000), (10_000, 9_000), (20_000, 1)])
def test_images_that_would_fill_the_memory(size, tmp_path):
    (tmp_path / "big.png").write_bytes(png(*size))
    with pytest.raises(dyconvert.DyconvertError, match=r"at most|Crop it|bomb"):
        Preprocessing(size=(3, 224, 224), resize=256)(tmp_path / "big.png")


@pytest.mark.parametrize("what", ["pipe", "folder", "empty", "text", "nothing", "/dev/zero"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")
def test_what_is_no_image(what, tmp_path):
    file = tmp_path / "x.png"
    if what == "pipe":
        os.mkfifo(file)
    elif what == "folder":
        file.mkdir()
    elif what == "/dev/zero":
        file.symlink_to(what)
    elif what != "nothing":
        file.write_text("" if what == "empty" else "text")
    with pytest.raises(dyconvert.DyconvertError, match=r"x\.png"):
        Preprocessing(size=(3, 8, 8))(file)


@pytest.mark.parametrize("value", [5, None, torch.zeros(3, 8, 8), b"x"], ids=lambda value: type(value).__name__)
def test_other_kinds_of_images(value):
    with pytest.raises(dyconvert.DyconvertError, match="PIL image or a file"):
        Preprocessing(size=(3, 8, 8))(value)


@pytest.mark.parametrize(
    "change",
    [
        {"size": (3, 10**6, 8)},
        {"resize": 10**6},
        {"mean": (float("nan"), 0, 0)},
        {"std": (float("inf"), 1, 1)},
        {"std": (0, 1, 1)},
        {"size": (2, 8, 8)},
    ],
    ids=str,
)
def test_settings_that_make_no_sense(change):
    with pytest.raises(ValueError, match="validation error"):
        Preprocessing(**({"size": (3, 8, 8)} | change))
