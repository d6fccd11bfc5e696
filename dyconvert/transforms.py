"""The preprocessing of images for a model, as plain data that a checkpoint can hold."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dyconvert.errors import DyconvertError
from dyconvert.limits import IMAGE_PIXELS, INPUT_SIDE, NORMAL

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

# Means and deviations of each channel, as torchvision and timm normalise.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIZE = Annotated[int, Field(ge=1, le=INPUT_SIDE)]
_NUMBER = Annotated[float, Field(ge=-NORMAL, le=NORMAL)]


class Preprocessing(BaseModel):
    """Reads an image, resizes and crops it, and normalises it by channel.

    Attributes:
        size: (C, H, W) of the model's input; C is 1 (grey) or 3 (RGB).
        resize: length of the shorter side before the centre crop to H x W, or (height, width); None doesn't resize.
        keep: images that are H x W already aren't resized.
        interpolation: "nearest", "bilinear" or "bicubic".
        on: what is resized, a decoded "image" (as torchvision's and timm's transforms do) or its "tensor" of bytes (as
            recipes do); the two round differently.
        mean, std: of the normalisation, one number for each channel, of values from 0 to 1.
        classes: names of the model's outputs; None where they aren't known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: tuple[_SIZE, _SIZE, _SIZE]
    resize: _SIZE | tuple[_SIZE, _SIZE] | None = None
    keep: bool = False
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    on: Literal["image", "tensor"] = "image"
    mean: tuple[_NUMBER, ...] = IMAGENET_MEAN
    std: tuple[_NUMBER, ...] = IMAGENET_STD
    classes: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Preprocessing":
        if self.size[0] not in (1, 3):
            raise ValueError("images have 1 or 3 channels")
        if not len(self.mean) == len(self.std) == self.size[0]:
            raise ValueError(f"mean and std need a number for each of {self.size[0]} channels")
        if min(self.std) <= 0:
            raise ValueError("std has to be above 0")
        return self

    def __call__(self, image: Union["Image", str, os.PathLike[str]]) -> "Tensor":
        """The image, a PIL image or a file, as the model takes it: `[C, H, W]`, float32.

        Raises:
            DyconvertError: the file can't be read as an image, or would become too large.
        """
        from torchvision.transforms.v2 import functional as F

        decoded: Any = self._decoded(image)
        if self.on == "tensor":
            decoded = F.pil_to_tensor(decoded)
        height, width = self.size[1:]
        if self.resize is not None and not (self.keep and tuple(F.get_size(decoded)) == (height, width)):
            sides = [self.resize] if isinstance(self.resize, int) else list(self.resize)
            self._check_resized(*F.get_size(decoded))
            decoded = F.resize(decoded, sides, interpolation=F.InterpolationMode(self.interpolation), antialias=True)
        decoded = F.center_crop(decoded, [height, width])
        tensor = decoded if self.on == "tensor" else F.pil_to_tensor(decoded)
        return F.normalize(tensor.float() / 255, list(self.mean), list(self.std))

    def _decoded(self, image: Any) -> "Image":
        from PIL import Image

        from dyconvert.pictures import PictureError, in_mode, read_picture

        mode = "L" if self.size[0] == 1 else "RGB"
        name = "The image"
        try:
            if isinstance(image, Image.Image):
                return in_mode(image, mode)
            if not isinstance(image, str | os.PathLike):
                raise DyconvertError(f"An image is a PIL image or a file, and not a {type(image).__name__}.")
            name = str(image)
            if not os.path.exists(image):
                raise DyconvertError(f"There is no image {image}. Give the path of an existing file.")
            return read_picture(image, mode)
        except (PictureError, ValueError) as error:
            raise DyconvertError(
                f"{name} can't be read as an image: {error}. It is damaged, or of another kind."
            ) from error

    def _check_resized(self, height: int, width: int) -> None:
        """Refuse what would grow beyond all measure: a long line, whose shorter side is one pixel."""
        if isinstance(self.resize, int) and self.resize**2 * max(height, width) > IMAGE_PIXELS * min(height, width):
            raise DyconvertError(
                f"An image of {width:,} x {height:,} pixels, whose shorter side is to have {self.resize:,}, would have "
                f"more than {IMAGE_PIXELS:,}. Crop it first."
            )

    def batch(self, images: Sequence[Any]) -> "Tensor":
        """Several images, `[N, C, H, W]`.

        Raises:
            DyconvertError: one can't be read.
        """
        import torch

        return torch.stack([self(image) for image in images])

    def class_name(self, index: int) -> str:
        """The name of an output; its number where it has none."""
        return self.classes[index] if self.classes is not None and index < len(self.classes) else str(index)
