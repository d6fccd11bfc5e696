"""Small networks and recipes to fine-tune: factories that recipes name, and a recipe on fake data."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dyconvert import Recipe
from dyconvert.finetuning.recipes.recipe import load_recipe

FILE = Path(__file__)


def tiny(num_classes: int = 4, channels: int = 3, norm: bool = True) -> nn.Module:
    """Three convs, two of which become dynamic; with dropout, so that random numbers matter."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Dropout(0.2 if norm else 0.0),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


def plain(num_classes: int = 4) -> nn.Module:
    """Without batch norm and dropout: what one process computes, several can compute as well."""
    return tiny(num_classes, norm=False)


class Segmenter(nn.Module):
    """A mask and an auxiliary one, as torchvision's segmentation models return them."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, num_classes, 1)
        self.aux = nn.Conv2d(8, num_classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.conv1(self.stem(x).relu()).relu()
        return {"out": self.head(self.conv2(x).relu()), "aux": self.aux(x)}


def recipe(directory: Path, *overrides: str, model: str = "tiny", **sections: Any) -> Recipe:
    """A recipe on a hundred fake images of 8x8: six batches an epoch."""
    content = {
        "model": {"specifier": f"{FILE}:{model}", "weights": "none"},
        "convert": {"method": "dynet", "g": 2},
        "data": {"dataset": "fake", "size": 8, "images": 100, "augment": "cifar", "workers": 0},
        "train": {"epochs": 2, "batch": 16, "lr": 0.05, "accelerator": "cpu", "devices": 1},
        "output": {"directory": str(directory / "run")},
    }
    for section, values in sections.items():
        known = content.get(section)
        content[section] = {**known, **values} if isinstance(known, dict) and isinstance(values, dict) else values
    import yaml

    file = directory / "tiny.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return load_recipe(file, overrides)
