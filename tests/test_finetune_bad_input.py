"""What can be wrong with a recipe's data, classes and devices is said before anything is trained or written."""

import os
from pathlib import Path

import numpy as np
import pytest
from finetune_nets import FILE, recipe
from PIL import Image

from dyconvert import DyconvertError, ModelError, RecipeError, finetune


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An ImageFolder of four classes, 8 images to train on and 2 to validate on each."""
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for label in "abcd":
            place = tmp_path / "images" / part / label
            place.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(256, size=(9, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    return tmp_path


def from_folder(tmp_path: Path, *overrides: str, **sections):
    return recipe(
        tmp_path,
        *overrides,
        data={"dataset": "imagefolder", "root": str(tmp_path / "images")},
        train={"batch": 8, "epochs": 1},
        **sections,
    )


def refused(made, *words: str, kind: type[DyconvertError] = RecipeError) -> None:
    with pytest.raises(kind) as found:
        finetune(made, trust_code=True)
    for word in words:
        assert word in str(found.value)
    assert not made.directory.exists()


def test_folder_trains_and_says_what_it_holds(folder):
    found = finetune(from_folder(folder), progress=False, trust_code=True)
    assert found.images == (32, 8)
    assert found.corrupt == 0
    assert 0 <= found.finetuned <= 100


def test_missing_folders(folder):
    refused(from_folder(folder, f"data.root={folder / 'nowhere'}"), "nowhere", "data.root")
    refused(from_folder(folder, "data.val=test"), "test", "train, val", "data.val")


def test_empty_class_folders(folder):
    for name in ("e", "f"):
        (folder / "images/train" / name).mkdir()
    refused(from_folder(folder), "2 class folders without images", "e, f")


def test_corrupt_images_are_named_or_skipped_and_counted(folder):
    broken = folder / "images/train/b/3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (folder / "images/val/c/0.png").write_bytes(b"no image")
    refused(from_folder(folder), str(broken), "data.skip_corrupt=true")
    found = finetune(from_folder(folder, "data.skip_corrupt=true"), progress=False, trust_code=True)
    assert found.corrupt == 2
    assert found.images == (31, 7)


def test_corrupt_images_that_are_read_during_training(folder, monkeypatch, capfd):
    """Where the images don't fit into memory only their headers are looked at first."""
    monkeypatch.setattr("dyconvert.finetuning.data.datasets.IN_MEMORY", 0)
    (folder / "images/train/a/0.png").write_bytes(b"no image")
    refused(from_folder(folder), "train/a/0.png")
    (folder / "images/train/a/0.png").unlink()
    broken = folder / "images/train/b/3.png"
    broken.write_bytes(broken.read_bytes()[:-40])
    with pytest.raises(RecipeError, match=r"b/3\.png"):
        finetune(from_folder(folder), progress=False, trust_code=True)
    os.rename(folder / "run", folder / "before")
    finetune(from_folder(folder, "data.skip_corrupt=true"), progress=False, trust_code=True)
    assert "b/3.png" in capfd.readouterr().err


def test_classes_that_do_not_match(folder):
    refused(from_folder(folder, "model.arguments={num_classes: 7}"), "4 classes", "7 outputs", "model.num_classes=4")
    os.rename(folder / "images/val/d", folder / "images/val/e")
    refused(from_folder(folder), "lacks d", "only it has e")


def test_a_new_head_fits_the_data(folder):
    made = from_folder(folder, "model.arguments={num_classes: 7}", "model.num_classes=4")
    assert finetune(made, progress=False, trust_code=True).images == (32, 8)


def test_more_devices_than_there_are(tmp_path):
    there = os.cpu_count()
    made = recipe(tmp_path, f"train.devices={there + 1}", f"train.batch={there + 1}")
    refused(made, f"{there + 1} CPU cores", f"has {there}")
    refused(recipe(tmp_path, "train.strategy=fsdp"), "needs GPUs")


def test_too_few_images_for_a_batch(tmp_path):
    refused(recipe(tmp_path, "data.images=10"), "10 training images", "batch of 16")


def test_images_that_the_network_cannot_take(tmp_path):
    made = recipe(tmp_path, "data.channels=1", "data.mean=[0.5]", "data.std=[0.5]")
    refused(made, "1x8x8", "data.channels", kind=ModelError)


def test_output_that_is_not_of_the_task(tmp_path):
    made = recipe(tmp_path, f"model.specifier={FILE}:Segmenter")
    refused(made, "classification", kind=ModelError)


def test_unknown_torchvision_dataset(tmp_path):
    refused(recipe(tmp_path, "data.dataset=torchvision:CIFAR11", f"data.root={tmp_path}"), "CIFAR10")
    made = recipe(tmp_path, "data.dataset=torchvision:CIFAR10", f"data.root={tmp_path}")
    refused(made, "data.download=true")


def test_averages_and_shards_do_not_go_together(tmp_path):
    refused(recipe(tmp_path, "train.strategy=fsdp", "train.ema=0.9"), "train.ema", "fsdp")
