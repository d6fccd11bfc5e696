"""Real weights, real images: what a converted model is for. Needs DYCONVERT_DATA."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dyconvert
from dyconvert import models

# Top-1 of the trained files over the 10,000 test images, in percent.
CIFAR = {"resnet20": ("resnet20-12fca82f.th", 91.73), "resnet32": ("resnet32-d509ac18.th", 92.63)}


@pytest.fixture(scope="module")
def cifar10_test(data_dir: Path) -> tuple[Tensor, Tensor]:
    """All test images `[10000, 3, 32, 32]`, normalised, and their labels."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        pixels = np.asarray(Image.open(data_dir / "cifar10" / "test.png")).reshape(-1, 32, 32, 3)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    images = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float().div(255)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    labels = torch.from_numpy(np.load(data_dir / "cifar10" / "test_labels.npy").astype(np.int64))
    return (images - mean) / std, labels


@torch.inference_mode()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(
        (model(x).argmax(1) == y).sum().item() for x, y in zip(images.split(250), labels.split(250), strict=True)
    )
    return 100 * right / len(labels)


CASES = [(name, method) for name in CIFAR for method in dyconvert.METHODS]


@pytest.mark.parametrize(
    ("name", "method"), [CASES[0], *(pytest.param(*c, marks=pytest.mark.sweep) for c in CASES[1:])]
)
def test_cifar_resnets_score_the_same(
    name: str, method: str, data_dir: Path, cifar10_test: tuple[Tensor, Tensor], cli: Callable, tmp_path: Path
) -> None:
    file, expected = CIFAR[name]
    weights = data_dir / "cifar10_resnets" / file
    specifier = f"builtin:cifar-{name}"
    ran = cli(specifier, "--weights", weights, "--method", method, "--g", 6, "--input-size", 32, "--output", "out")
    assert ran.code == 0, ran.stderr
    if method == "dynet":  # before the conversion: once is enough
        assert top1(models.create(specifier, str(weights))[0], *cifar10_test) == pytest.approx(expected, abs=0.005)
    dynamic = dyconvert.load(tmp_path / "out")
    # One image of 10,000 may change sides by rounding.
    assert top1(dynamic, *cifar10_test) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("method", dyconvert.METHODS)
def test_efficientnet_lite0_logits(method: str, data_dir: Path) -> None:
    pytest.importorskip("timm")
    weights = data_dir / "efficientnet_lite0" / "tf_efficientnet_lite0.pt"
    model, _ = models.create("timm:tf_efficientnet_lite0", str(weights))
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    dynamic = dyconvert.convert(model, method=method)
    assert dyconvert.verify(model, dynamic, images).relative < 1e-4
