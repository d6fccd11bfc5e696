"""Folders of images, for the commands that need some."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from dyconvert import builtin
from dyconvert.errors import DyconvertError, ModelError

_IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}

# Of ImageNet's images, by channel.
MEAN, STD = "0.485,0.456,0.406", "0.229,0.224,0.225"


def numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ModelError(f"{text!r} is no list of numbers such as 0.485,0.456,0.406.") from None


def batches(
    data: str, like: Tensor, mean: list[float], std: list[float], limit: int | None, batch_size: int
) -> Iterator[Tensor]:
    """The images in batches `[N, C, H, W]`, resized and cropped to the size of `like`."""
    if data == "digits" and not Path(data).exists():
        yield from builtin.load_digits_test()[0][:limit].split(batch_size)
        return
    channels, *spatial = like.shape[1:]
    if len(spatial) != 2 or channels not in (1, 3):
        raise ModelError(f"--data reads images, and the model takes {list(like.shape[1:])}. Use dyconvert.collapse.")
    if channels == 1 and len(mean) == len(std) == 3:
        mean, std = [sum(mean) / 3], [sum(std) / 3]
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ModelError(f"--mean and --std need a number for each of {channels} channels, and std above zero.")
    transform = v2.Compose(
        [
            v2.Resize(min(spatial), antialias=True) if spatial[0] == spatial[1] else v2.Resize(spatial, antialias=True),
            v2.CenterCrop(spatial),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )
    files = _files(Path(data))
    if limit is not None and limit < len(files):
        files = [files[i * len(files) // limit] for i in range(limit)]
    for start in range(0, len(files), batch_size):
        yield torch.stack([_read(file, transform, channels) for file in files[start : start + batch_size]])


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ModelError(f"--data {folder} is no folder. Give a folder of images, or `digits`.")
    found = sorted(
        Path(parent) / name
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in _IMAGES
    )
    if not found:
        raise ModelError(f"--data {folder} holds no images ({', '.join(sorted(_IMAGES))}), nor do its subfolders.")
    return found


def _read(file: Path, transform: v2.Transform, channels: int) -> Tensor:
    try:
        with Image.open(file) as image:
            return transform(image.convert("RGB" if channels == 3 else "L"))
    except (OSError, UnidentifiedImageError) as error:
        raise DyconvertError(f"{file} can't be read as an image: {error}. Remove it, or repair it.") from error
