"""Image files as anyone may have made them: found without going in circles, opened within limits, in 8 bits."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dyconvert.limits import IMAGE_PIXELS, check_ordinary

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


class PictureError(ValueError):
    """A file can't be read as an image; the message says why."""


def picture_files(folder: Path) -> list[Path]:
    """The images in a folder and in its subfolders, sorted; links to folders are followed, but not in circles.

    Within one subfolder of `folder`, which may be a class, each folder is entered once.
    """
    top = os.path.realpath(folder)
    files = [Path(entry.path) for entry in os.scandir(folder) if _is_picture(entry.name) and not entry.is_dir()]
    for entry in os.scandir(folder):
        if entry.is_dir():
            files += _below(entry.path, top)
    return sorted(files)


def _below(folder: str, top: str) -> Iterator[Path]:
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen or f"{top}{os.sep}".startswith(f"{real.rstrip(os.sep)}{os.sep}"):
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(parent, name) for name in names if _is_picture(name))


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def check_picture(file: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of an image in pixels, from the file's first bytes.

    Raises:
        PictureError: it can't be read as an image, or is larger than what is read.
    """
    with _opened(file) as image:
        return image.height, image.width


def read_picture(file: str | os.PathLike[str], mode: str) -> Image.Image:
    """An image as "RGB" or "L", 8 bits a channel.

    Raises:
        PictureError: it can't be read as an image, or is larger than what is read.
    """
    try:
        with _opened(file) as image:
            return in_mode(image, mode)
    except PictureError:
        raise
    except Exception as error:
        raise PictureError(_said(error)) from error


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """An opened image as "RGB" or "L". Of 16 bits a pixel the upper 8 are taken, where PIL would clip to white.

    Raises:
        PictureError: its pixels are of no known range.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM", None)):
        pixels = np.asarray(image)
        image = Image.fromarray((pixels.clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise PictureError(f"its pixels are of mode {image.mode!r}, whose range isn't known; save it with 8 or 16 bits")
    return image.convert(mode)


def _opened(file: str | os.PathLike[str]) -> Image.Image:
    # PIL's plugins raise errors of many kinds for files that are damaged or made to damage.
    try:
        check_ordinary(Path(file))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(file)
    except Exception as error:
        raise PictureError(_said(error)) from error
    if image.width * image.height > IMAGE_PIXELS:
        image.close()
        raise PictureError(f"it has {image.width:,} x {image.height:,} pixels, and at most {IMAGE_PIXELS:,} are read")
    return image


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0].rstrip('.') if str(error) else 'no reason given'}"
