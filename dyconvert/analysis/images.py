"""Images from a folder, as a model takes them: with their classes, in batches, and as pictures to show."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from dyconvert import builtin
from dyconvert.errors import DyconvertError, ModelError

# Mean and standard deviation by channel, as torchvision normalises.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


@dataclass
class ImageSet:
    """Images that are read when they are asked for.

    Attributes:
        name: where they are.
        classes: the names of the folders that they stand in; empty if they stand in none.
        labels: the class of each, `[N]`; -1 for an image beside the folders.
        files: of each, or none where `tensors` has them, `[N, C, H, W]`.
        total: how many there were before `limit`.
        shape: `(C, H, W)` of each.
    """

    name: str
    classes: list[str]
    labels: Tensor
    total: int
    shape: tuple[int, ...]
    transform: v2.Transform | None = None
    files: list[Path] = field(default_factory=list)
    tensors: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images `[<=size, C, H, W]`, normalised, and their labels."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            if self.tensors is not None:
                images = self.tensors[part]
            else:
                images = torch.stack([self._read(file) for file in self.files[part]])
            yield images, self.labels[part]

    def picture(self, index: int) -> Image.Image:
        """The image as it is on the disk."""
        if self.tensors is None:
            with _opened(self.files[index]) as image:
                return image.convert("RGB")
        pixels = self.tensors[index].mul(255).clamp(0, 255).byte()
        return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())

    def _read(self, file: Path) -> Tensor:
        with _opened(file) as image:
            return self.transform(image.convert("RGB" if self.shape[0] == 3 else "L"))


def read_images(
    data: str,
    shape: Sequence[int],
    mean: Sequence[float] = IMAGENET[0],
    std: Sequence[float] = IMAGENET[1],
    limit: int | None = None,
) -> ImageSet:
    """The images of a folder, resized and cropped to `shape`; those in a subfolder are a class.

    Args:
        data: a folder, or "digits": those that come with the package.
        shape: `(C, H, W)`, as the model takes them.
        mean, std: of the normalisation, by channel; averaged for a model of one channel.
        limit: at most so many, evenly spread.

    Raises:
        ModelError: there is no such folder, or no image in it; the model takes no images of 1 or 3 channels; `mean`
            and `std` don't fit them.
        DyconvertError: an image can't be read.
    """
    if data == "digits" and not Path(data).exists():
        images, labels = builtin.load_digits_test()
        return ImageSet(
            data, [*"0123456789"], labels[:limit], len(labels), tuple(images.shape[1:]), tensors=images[:limit]
        )
    channels, *spatial = shape
    if len(spatial) != 2 or channels not in (1, 3):
        raise ModelError(
            f"Folders hold images, and the model takes {list(shape)}. Pass batches of your own in Python: "
            "dyconvert.analysis, dyconvert.collapse."
        )
    if channels == 1 and len(mean) == len(std) == 3:
        mean, std = [sum(mean) / 3], [sum(std) / 3]
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ModelError(f"`mean=...` and `std=...` need a number for each of {channels} channels, and std above zero.")
    transform = v2.Compose(
        [
            v2.Resize(min(spatial), antialias=True) if spatial[0] == spatial[1] else v2.Resize(spatial, antialias=True),
            v2.CenterCrop(spatial),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )
    folder = Path(data)
    files = image_files(folder)
    total = len(files)
    if limit is not None and limit < total:
        files = [files[i * total // limit] for i in range(limit)]
    classes, labels = _classes(folder, files)
    return ImageSet(data, classes, labels, total, tuple(shape), transform, files)


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and in its subfolders, sorted.

    Raises:
        ModelError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise ModelError(f"`data={folder}` is no folder. Give a folder of images, or `digits`.")
    found = sorted(
        Path(parent) / name
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES
    )
    if not found:
        raise ModelError(f"`data={folder}` holds no images ({', '.join(sorted(SUFFIXES))}), nor do its subfolders.")
    return found


def image_size(file: Path) -> tuple[int, int]:
    """(height, width) in pixels."""
    with _opened(file) as image:
        return image.height, image.width


def _classes(folder: Path, files: list[Path]) -> tuple[list[str], Tensor]:
    parts = [file.relative_to(folder).parts for file in files]
    # All the folder's classes, also those that a limit has left without an image: a label is a model's output.
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    number = {name: index for index, name in enumerate(classes)}
    labels = [number.get(each[0], -1) if len(each) > 1 else -1 for each in parts]
    return (classes if max(labels) >= 0 else []), torch.tensor(labels)


def _opened(file: Path) -> Image.Image:
    try:
        image = Image.open(file)
        image.load()
    except (OSError, UnidentifiedImageError) as error:
        raise DyconvertError(f"{file} can't be read as an image: {error}. Remove it, or repair it.") from error
    return image
