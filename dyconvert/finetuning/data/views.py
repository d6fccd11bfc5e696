"""Crops and flips whole batches of training images, which lie in memory as bytes and have one size.

An image's crop and flip depend only on (seed, epoch, position): so they are the same in any batch, in any process and
after a resume. If the number of views is limited, they are the same in every run too, and a teacher's outputs for them
can be cached.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dyconvert.finetuning.recipes.schema import VIEWS, Data
from dyconvert.finetuning.training.randomness import seeds_of

# For each augmentation: pixels of zeros around the image before it is cropped, and whether half of the images are
# flipped.
_PRESETS = dict(zip(VIEWS, ((0, False), (0, True), (1, False), (4, True)), strict=True))
# The seed of numbered views, in place of a run's.
_NUMBERED = 0x76696577


def has_views(data: Data, shape: Sequence[int]) -> bool:
    """Whether this recipe's augmentation can crop and flip whole batches of images of `shape`, (..., H, W)."""
    fits = tuple(shape[-2:]) == (data.size, data.size) and data.resize in (None, data.size)
    return data.task == "classification" and data.augment in VIEWS and fits


class Views:
    """Crops and flips of images, by (epoch, position).

    Args:
        preset: of `data.augment`: none, flip, shift or cifar.
        seed: the run's.
        count: views of each image, the same for all seeds; None for a new one every epoch.
    """

    def __init__(self, preset: str, seed: int, count: int | None = None) -> None:
        self.padding, self.flips = _PRESETS[preset]
        self.seed, self.count = seed, count

    def __call__(self, images: Tensor, epochs: np.ndarray, positions: np.ndarray) -> Tensor:
        """Crop and flip the images `[N, C, H, W]` for their epochs; contiguous.

        Args:
            epochs, positions: `[N]`, of each image.
        """
        if self.count is None:
            return self._carry_out(images, seeds_of(self.seed, epochs, positions))
        return self.numbered(images, self.which(epochs, positions), positions)

    def which(self, epochs: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The numbers of the views, from 0 to count - 1; `count` epochs in a row see all of them."""
        first = seeds_of(self.seed, positions) % np.uint64(self.count)
        return (first.astype(np.int64) + epochs) % self.count

    def numbered(self, images: Tensor, which: np.ndarray, positions: np.ndarray) -> Tensor:
        """The view of each image that has this number."""
        return self._carry_out(images, seeds_of(_NUMBERED, which, positions))

    def _carry_out(self, images: Tensor, drawn: np.ndarray) -> Tensor:
        if self.padding:
            offsets = np.uint64(2 * self.padding + 1)
            down, right = (torch.from_numpy((bits % offsets).astype(np.int64)) for bits in (drawn >> 8, drawn >> 24))
            height, width = images.shape[-2:]
            padded = F.pad(images, [self.padding] * 4)
            crops = padded.unfold(2, height, 1).unfold(3, width, 1)  # [N, C, offsets, offsets, H, W]
            images = crops[torch.arange(len(images)), :, down, right]
        if self.flips:
            flipped = torch.from_numpy((drawn & 1).astype(bool))
            images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)
        return images.contiguous()
