"""Training images of one size, in memory as bytes: cropped, flipped and batched all at once.

Which crop and flip an image gets depends only on (seed, epoch, position), as everything here; so it is the same in any
batch, process and resumed run. Of these views a teacher's outputs can be kept.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dyconvert.finetuning.recipes.schema import Data
from dyconvert.finetuning.training.randomness import seeds_of

# Pixels of zeros around the image, from which it is cropped again, and whether half of the images are flipped.
_PRESETS = {"none": (0, False), "flip": (0, True), "shift": (1, False), "cifar": (4, True)}


def has_views(data: Data, shape: Sequence[int]) -> bool:
    """Whether images of `shape`, (C, H, W), can be augmented as a batch by this recipe."""
    fits = tuple(shape[-2:]) == (data.size, data.size) and data.resize in (None, data.size)
    return data.task == "classification" and data.augment in _PRESETS and fits


def views(images: Tensor, preset: str, seed: int, epochs: np.ndarray, positions: np.ndarray) -> Tensor:
    """Crop and flip a batch.

    Args:
        images: `[N, C, H, W]`.
        preset: of `data.augment`: none, flip, shift or cifar.
        seed: the run's.
        epochs, positions: `[N]`, of each image.

    Returns:
        `[N, C, H, W]`, contiguous.
    """
    padding, flips = _PRESETS[preset]
    drawn = seeds_of(seed, epochs, positions)
    if padding:
        offsets = 2 * padding + 1
        down, right = (torch.from_numpy((part % offsets).astype(np.int64)) for part in (drawn >> 8, drawn >> 24))
        height, width = images.shape[-2:]
        padded = F.pad(images, [padding] * 4)
        crops = padded.unfold(2, height, 1).unfold(3, width, 1)  # [N, C, offsets, offsets, H, W]
        images = crops[torch.arange(len(images)), :, down, right]
    if flips:
        flipped = torch.from_numpy((drawn & 1).astype(bool))
        images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)
    return images.contiguous()
