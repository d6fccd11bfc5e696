"""Images from a folder, as a model takes them: with their classes, in batches, and as pictures to show."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from dyconvert import builtin
from dyconvert.errors import DyconvertError, ModelError
from dyconvert.paths import as_path, shown
from dyconvert.pictures import SUFFIXES, PictureError, check_picture, picture_files, read_picture

# Mean and standard deviation by channel, as torchvision normalises.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class ImageSet:
    """Images that are read when they are asked for.

    Attributes:
        name: where they are.
        classes: the names of the folders that they stand in; empty if they stand in none.
        labels: the class of each, `[N]`; -1 for an image beside the folders.
        files: of each, or none where `tensors` has them, `[N, C, H, W]`, not yet normalised by `mean` and `std`.
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
    mean: float = 0.0
    std: float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images `[<=size, C, H, W]`, normalised, and their labels."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            if self.tensors is not None:
                images = (self.tensors[part] - self.mean) / self.std
            else:
                images = torch.stack([self._read(file) for file in self.files[part]])
            yield images, self.labels[part]

    def picture(self, index: int) -> Image.Image:
        """The image as it is on the disk."""
        if self.tensors is None:
            return _read(self.files[index], "RGB")
        pixels = self.tensors[index].mul(255).clamp(0, 255).byte()
        return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())

    def _read(self, file: Path) -> Tensor:
        return self.transform(_read(file, "RGB" if self.shape[0] == 3 else "L"))


def read_images(
    data: str,
    shape: Sequence[int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    limit: int | None = None,
) -> ImageSet:
    """The images of a folder, resized and cropped to `shape`; those in a subfolder are a class.

    Args:
        data: a folder, or "digits": those that come with the package.
        shape: `(C, H, W)`, as the model takes them.
        mean, std: of the normalisation, by channel; averaged for a model of one channel. None: ImageNet's, and of the
            digits 0 and 1, with which the model that comes with the package was trained.
        limit: at most this many, at even intervals.

    Raises:
        ModelError: there is no such folder, or no image in it; the model takes no images of 1 or 3 channels; `mean`
            and `std` don't fit them.
        DyconvertError: an image can't be read.
    """
    if data == "digits":  # a folder of that name is ./digits
        images, labels = builtin.load_digits_test()
        mean, std = (0.0,) if mean is None else mean, (1.0,) if std is None else std
        if len(mean) != 1 or len(std) != 1 or std[0] <= 0:
            raise ModelError("The digits are grey: `mean=...` and `std=...` take one number each, and std above zero.")
        return ImageSet(
            data,
            [*"0123456789"],
            labels[:limit],
            len(labels),
            tuple(images.shape[1:]),
            tensors=images[:limit],
            mean=mean[0],
            std=std[0],
        )
    mean, std = IMAGENET[0] if mean is None else mean, IMAGENET[1] if std is None else std
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
    folder = as_path(data, ModelError)
    files = image_files(folder)
    total = len(files)
    if limit is not None and limit < total:
        files = [files[i * total // limit] for i in range(limit)]
    classes, labels = _classes(folder, files)
    return ImageSet(shown(data), classes, labels, total, tuple(shape), transform, files)


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and in its subfolders, sorted.

    Raises:
        ModelError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder. Give a folder of images, or `digits`.")
    try:
        files = picture_files(folder)
    except OSError as error:
        raise ModelError(f"{folder} can't be read: {error.strerror}. Give a folder of images.") from None
    if not files:
        raise ModelError(
            f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}), nor do its subfolders. Give another folder."
        )
    return files


def image_size(file: Path) -> tuple[int, int]:
    """(height, width) in pixels."""
    try:
        return check_picture(file)
    except PictureError as error:
        raise _unreadable(file, error) from error


def _classes(folder: Path, files: list[Path]) -> tuple[list[str], Tensor]:
    parts = [file.relative_to(folder).parts for file in files]
    # All the folder's classes, also those that a limit has left without an image: a label is a model's output.
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    number = {name: index for index, name in enumerate(classes)}
    labels = [number.get(each[0], -1) if len(each) > 1 else -1 for each in parts]
    return ([shown(name) for name in classes] if max(labels) >= 0 else []), torch.tensor(labels)


def _read(file: Path, mode: str) -> Image.Image:
    try:
        return read_picture(file, mode)
    except PictureError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: PictureError) -> DyconvertError:
    return DyconvertError(f"{shown(str(file))} can't be read as an image: {error}. Remove it, or repair it.")
