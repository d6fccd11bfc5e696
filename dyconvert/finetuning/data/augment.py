"""The augmentation presets of recipes, of torchvision's transforms."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from dyconvert.finetuning.recipes.recipe import Recipe
from dyconvert.finetuning.recipes.schema import Data
from dyconvert.transforms import Preprocessing

Transform = Callable[..., Any]


def train_transform(data: Data) -> Transform:
    """The transform of training images `[C, H, W]`, and of their masks, to `[C, size, size]`."""
    size, resize = data.size, _Fit(data)
    presets: dict[str, list[nn.Module]] = {
        "none": [resize],
        "flip": [resize, v2.RandomHorizontalFlip()],
        "shift": [resize, v2.RandomCrop(size, padding=1)],
        "cifar": [resize, v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip()],
        "imagenet": [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()],
        "segmentation": [
            v2.RandomResize(max(size // 2, 1), 2 * size, antialias=True),
            v2.RandomCrop(size, pad_if_needed=True, fill=_fill(data)),
            v2.RandomHorizontalFlip(),
        ],
    }
    presets["imagenet-randaugment"] = [*presets["imagenet"], v2.RandAugment()]
    presets["imagenet-trivialaugment"] = [*presets["imagenet"], v2.TrivialAugmentWide()]
    if data.task == "segmentation" and data.augment == "none":
        return v2.Compose([resize])
    return v2.Compose(presets[data.augment])


def val_transform(data: Data) -> Transform:
    """The transform of validation images: resize and crop; with a mask, only resize."""
    return _Fit(data)


def preprocessing_of_data(recipe: Recipe, classes: Sequence[str] | None) -> Preprocessing:
    """The preprocessing of validation images, with the classes' names, for the checkpoint."""
    data = recipe.data
    return Preprocessing(
        size=recipe.input_size,
        resize=data.resize or round(data.size / 0.875),
        keep=data.resize is None,
        on="tensor",
        mean=data.mean,
        std=data.std,
        classes=None if classes is None else tuple(classes),
    )


class _Fit(nn.Module):
    """Resizes the shorter side to `resize`, and crops the centre to `size`.

    Images of `size` stay as they are unless the recipe sets `resize`; images with masks aren't cropped.
    """

    def __init__(self, data: Data) -> None:
        super().__init__()
        self.size = data.size
        self.crop = data.task == "classification" or data.augment == "none"
        shorter = data.resize or (data.size if data.task == "segmentation" else round(data.size / 0.875))
        self.resize = v2.Resize(shorter, antialias=True)
        self.center = v2.CenterCrop(data.size)
        self.always = data.resize is not None

    def forward(self, image: torch.Tensor, *masks: torch.Tensor) -> Any:
        mask = list(masks)
        if self.always or tuple(image.shape[-2:]) != (self.size, self.size):
            image, *mask = self.resize(tv_tensors.Image(image), *mask) if mask else (self.resize(image),)
        if self.crop:
            image, *mask = self.center(tv_tensors.Image(image), *mask) if mask else (self.center(image),)
        return (image, *mask) if mask else image


def _fill(data: Data) -> dict[type, Any]:
    return {tv_tensors.Image: 0, tv_tensors.Mask: data.ignore_index}
