"""Sources of images: a folder, torchvision, Hugging Face, scikit-learn's digits, or random numbers.

Every source is a sequence of (image, target): the image `[C, H, W]`, uint8 or floats of 0 to 1; the target an
int, or a mask `[H, W]`.
"""

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets, tv_tensors
from torchvision.transforms.v2 import functional as F

from dyconvert.errors import RecipeError, brief, some
from dyconvert.finetuning.recipes.recipe import Recipe
from dyconvert.finetuning.recipes.schema import Data
from dyconvert.finetuning.training.randomness import seed_of
from dyconvert.installation import install_command
from dyconvert.paths import shown
from dyconvert.pictures import PictureError, check_picture, in_mode, picture_files, read_picture

_MODES = {1: "L", 3: "RGB"}


class CorruptImageError(Exception):
    """An image can't be read; the message names it."""


class Images(Sequence[Any]):
    """Images and targets.

    Attributes:
        labels: one for each image; None if the targets are masks, or can't be known without reading all images.
        classes: names of the classes, or None if they have no names.
    """

    labels: np.ndarray | None = None
    classes: list[str] | None = None

    def name(self, index: int) -> str:
        """The image's name in messages."""
        return f"image {index}"

    def readable(self, index: int) -> None:
        """Check the image's header, where that is cheap.

        Raises:
            CorruptImageError: it can't be read.
        """


def open_images(recipe: Recipe, split: str, num_classes: int) -> Images:
    """Open the training or validation images.

    Args:
        split: "train" or "val".
        num_classes: of the network. Fake images have as many, unless the recipe says otherwise.

    Raises:
        RecipeError: there are none.
    """
    data = recipe.data
    kind, _, name = data.dataset.partition(":")
    if kind == "imagefolder":
        return _Folder(recipe.data_root, getattr(data, split), data.channels)
    if kind == "torchvision":
        return _Torchvision(name, recipe.data_root, getattr(data, split), data, split == "train")
    if kind == "huggingface":
        return _HuggingFace(name, getattr(data, split), data)
    if kind == "digits":
        return _Digits(split, data.channels)
    return _Fake(data, split, data.num_classes or num_classes)


class _Folder(Images):
    """root/SPLIT/CLASS/image, or further down; labels are those of torchvision's ImageFolder."""

    def __init__(self, root: Path, split: str, channels: int) -> None:
        folder = root / split
        if not root.is_dir():
            raise RecipeError(f"There is no data folder {root}. Set data.root to the folder that holds {split}/.")
        if not folder.is_dir():
            raise RecipeError(f"{root} has no folder {split}/, which data.dataset=imagefolder needs. {_listing(root)}")
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        if not names:
            raise RecipeError(
                f"{folder} has no class folders. The images belong into {folder}/CLASS/, one folder a class."
            )
        if len(names) == 1:
            raise RecipeError(
                f"{folder} has one class folder, {shown(names[0])}, and a classifier tells two or more apart. Add the "
                "others, or set data.train and data.val to the folders that hold the classes."
            )
        number = {name: label for label, name in enumerate(names)}
        files = [file for file in picture_files(folder) if file.parent != folder]
        self._samples = [(str(file), number[file.relative_to(folder).parts[0]]) for file in files]
        self.labels = np.array([label for _, label in self._samples], dtype=np.int64)
        counts = np.bincount(self.labels, minlength=len(names))
        self.classes = [shown(name) for name in names]
        empty = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        if empty:
            raise RecipeError(
                f"{folder} has {len(empty)} class folders without images: {some(empty)}. Fill or remove them."
            )
        self._mode = _MODES[channels]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self._samples[index]
        try:
            return F.pil_to_tensor(read_picture(path, self._mode)), label
        except PictureError as error:
            raise CorruptImageError(f"{shown(path)}: {error}") from error

    def name(self, index: int) -> str:
        return shown(self._samples[index][0])

    def readable(self, index: int) -> None:
        path = self._samples[index][0]
        try:
            check_picture(path)
        except PictureError as error:
            raise CorruptImageError(f"{shown(path)}: {error}") from error


class _Torchvision(Images):
    """A dataset of torchvision, by the name of its class."""

    def __init__(self, name: str, root: Path, split: str, data: Data, training: bool) -> None:
        kind = getattr(datasets, name, None)
        if not (isinstance(kind, type) and issubclass(kind, datasets.VisionDataset)):
            import difflib

            near = difflib.get_close_matches(name, datasets.__all__, n=3, cutoff=0.5)
            raise RecipeError(
                f"torchvision has no dataset {name!r}" + (f"; the nearest are {', '.join(near)}." if near else ".")
            )
        parameters = inspect.signature(kind).parameters
        arguments: dict[str, Any] = {"root": str(root)}
        if "train" in parameters:
            arguments["train"] = training
        elif "split" in parameters:
            arguments["split"] = split
        elif "image_set" in parameters:
            arguments["image_set"] = split
        if "download" in parameters:
            arguments["download"] = data.download
        if data.download:
            root.mkdir(parents=True, exist_ok=True)
        try:
            self._dataset = kind(**arguments | data.arguments)
        except Exception as error:
            download = "" if data.download or "download" not in parameters else ", or set data.download=true"
            raise RecipeError(
                f"torchvision's {name} ({split}) can't be opened in {root}: {brief(error)}. Check data.root, "
                f"data.{'train' if training else 'val'} and data.arguments{download}."
            ) from error
        self._mode = _MODES[data.channels]
        self._segmentation = data.task == "segmentation"
        targets = next(
            (
                values
                for key in ("targets", "labels", "_labels")
                if (values := getattr(self._dataset, key, None)) is not None
            ),
            None,
        )
        if not self._segmentation and targets is not None and len(targets) == len(self._dataset):
            self.labels = np.asarray(targets, dtype=np.int64)
        names = getattr(self._dataset, "classes", None)
        self.classes = [str(name) for name in names] if names and not self._segmentation else None

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        try:
            image, target = self._dataset[index]
            return _as_tensor(image, self._mode), _as_target(target, self._segmentation)
        except (OSError, ValueError, SyntaxError) as error:
            raise CorruptImageError(f"{self.name(index)}: {brief(error)}") from error

    def name(self, index: int) -> str:
        paths = getattr(self._dataset, "images", None) or getattr(self._dataset, "_image_files", None)
        if isinstance(paths, list) and len(paths) == len(self) and isinstance(paths[index], str | os.PathLike):
            return str(paths[index])
        return f"image {index} of {type(self._dataset).__name__}"


class _HuggingFace(Images):
    """A dataset of the Hugging Face hub, or on disk in one of its formats."""

    def __init__(self, name: str, split: str, data: Data) -> None:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise RecipeError(
                f"Hugging Face's datasets can't be imported: {error}. Run `pip install datasets`."
            ) from error
        try:
            self._dataset = load_dataset(name, split=split, **data.arguments)
        except Exception as error:
            raise RecipeError(
                f"The Hugging Face dataset {name!r} ({split}) can't be opened: {brief(error)}. Check data.dataset, "
                "data.train, data.val and data.arguments."
            ) from error
        for key in (data.image_column, data.label_column):
            if key not in self._dataset.column_names:
                raise RecipeError(
                    f"{name} has no column {key!r} but {some(self._dataset.column_names)}. Set data.image_column and "
                    "data.label_column."
                )
        self._image, self._label = data.image_column, data.label_column
        self._mode = _MODES[data.channels]
        self._segmentation = data.task == "segmentation"
        if not self._segmentation:
            self.labels = np.asarray(self._dataset[self._label][:], dtype=np.int64)
            self.classes = getattr(self._dataset.features[self._label], "names", None)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        try:
            row = self._dataset[int(index)]
            return _as_tensor(row[self._image], self._mode), _as_target(row[self._label], self._segmentation)
        except (OSError, ValueError, SyntaxError) as error:
            raise CorruptImageError(f"{self.name(index)}: {brief(error)}") from error


class _Digits(Images):
    """Scikit-learn's digits, 8x8. Validated on the fifth of them that the builtin digits model wasn't trained on."""

    def __init__(self, split: str, channels: int) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise RecipeError(f"scikit-learn can't be imported: {error}. Run `{install_command('train')}`.") from error
        digits = load_digits()
        train_images, val_images, train_labels, val_labels = train_test_split(
            digits.images, digits.target, test_size=0.2, random_state=0, stratify=digits.target
        )
        images, labels = (train_images, train_labels) if split == "train" else (val_images, val_labels)
        self._images = torch.from_numpy(images).float().div(16).unsqueeze(1).repeat(1, channels, 1, 1)
        self.labels = np.asarray(labels)
        self.classes = [str(name) for name in digits.target_names]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[index], int(self.labels[index])


class _Fake(Images):
    """Noise with random labels, the same at every run; validation has a fifth as many."""

    def __init__(self, data: Data, split: str, num_classes: int) -> None:
        self._shape = (data.channels, data.size, data.size)
        self._count = data.images if split == "train" else max(data.images // 5, 1)
        self._seed = 0 if split == "train" else 1
        self._num_classes = num_classes
        self._segmentation = data.task == "segmentation"
        self.classes = None if self._segmentation else [str(label) for label in range(num_classes)]
        if not self._segmentation:
            self.labels = np.array([seed_of(self._seed, i) % num_classes for i in range(self._count)])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        generator = torch.Generator().manual_seed(seed_of(self._seed, index))
        image = torch.randint(256, self._shape, generator=generator, dtype=torch.uint8)
        if not self._segmentation:
            return image, int(self.labels[index])
        mask = torch.randint(self._num_classes, self._shape[1:], generator=generator, dtype=torch.uint8)
        return image, tv_tensors.Mask(mask)


def _as_tensor(image: Any, mode: str) -> Tensor:
    if isinstance(image, Tensor):
        return image
    return F.pil_to_tensor(in_mode(image, mode))


def _as_target(target: Any, segmentation: bool) -> Any:
    if not segmentation:
        return int(target)
    mask = target if isinstance(target, Tensor) else torch.from_numpy(np.array(target))
    return tv_tensors.Mask(mask.squeeze())


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    return f"It has {some(names)}: set data.train and data.val." if names else "It has no folders at all."
