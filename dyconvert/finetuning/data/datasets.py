"""A recipe's data, checked before anything is trained on it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyconvert.errors import RecipeError, some
from dyconvert.finetuning.data.sources import CorruptImageError, Images, open_images
from dyconvert.finetuning.recipes.recipe import Recipe
from dyconvert.finetuning.training.randomness import seed_of

# Decoded images are held in memory up to this many bytes: decoding CIFAR's PNGs takes longer than augmenting them.
IN_MEMORY = 512 * 2**20
# Where the images don't fit into memory, the headers of at most so many files are read before training.
_HEADERS = 200_000


@dataclass
class Split:
    """The images to train on, or to validate on.

    Attributes:
        images: all images of the source.
        chosen: indices of the images to use.
        corrupt: names of images that can't be read and are left out.
        decoded: the decoded images and targets, in the order of `chosen`, if they are held in memory.
        stacked: the same images as one tensor `[N, C, H, W]`, if they are of one size, and their targets.
    """

    images: Images
    chosen: np.ndarray
    skip_corrupt: bool
    corrupt: list[str] = field(default_factory=list)
    decoded: list[tuple[Tensor, Any]] | None = None
    stacked: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    def get(self, position: int) -> tuple[Tensor, Any]:
        """Image and target. If the file can't be read and corrupt files are skipped, those of the next file.

        Raises:
            RecipeError: the file can't be read; it is named.
        """
        if self.decoded is not None:
            return self.decoded[position]
        for offset in range(len(self)):
            index = int(self.chosen[(position + offset) % len(self)])
            try:
                return self.images[index]
            except CorruptImageError as error:
                if not self.skip_corrupt:
                    raise RecipeError(_unreadable([str(error)])) from error
                # A worker process of the loader can't add to the run's count, but it can name the file.
                print(f"left out: {error}", file=sys.stderr)
        raise RecipeError("Not one image can be read.")


def load_split(recipe: Recipe, split: str, num_classes: int, report: Callable[[str], None]) -> Split:
    """Open and check the images of `split`, "train" or "val".

    Args:
        num_classes: of the network.
        report: gets a line if reading takes a while.

    Raises:
        RecipeError: no images, empty class folders, images that can't be read, labels that the network lacks.
    """
    data = recipe.data
    images = open_images(recipe, "train" if data.holdout is not None else split, num_classes)
    if not len(images):
        raise RecipeError(f"The {split} data ({data.dataset}) has no images.")
    candidates = np.arange(len(images))
    if data.holdout is not None:
        if data.holdout >= len(images):
            raise RecipeError(
                f"data.holdout = {data.holdout} leaves none of the {len(images)} training images. Set it lower."
            )
        held_out = _subset(images, candidates, data.holdout, data.subset_seed)
        candidates = held_out if split == "val" else np.setdiff1d(candidates, held_out)
    limit = data.limit_train if split == "train" else data.limit_val
    loaded = Split(images, _subset(images, candidates, limit, data.subset_seed), data.skip_corrupt)
    _read(loaded, report)
    if not len(loaded):
        raise RecipeError(f"Not one image of the {split} data can be read; the first is {loaded.corrupt[0]}.")
    return loaded


def check_classes(train: Split, val: Split, outputs: int, recipe: Recipe) -> None:
    """Refuse data with other classes than the network's.

    Args:
        outputs: number of classes of the network.

    Raises:
        RecipeError: the numbers differ, or the validation data has other classes than the training data.
    """
    ours, theirs = train.images.classes, val.images.classes
    if ours and theirs and ours != theirs:
        missing, unknown = sorted({*ours} - {*theirs}), sorted({*theirs} - {*ours})
        raise RecipeError(
            f"The validation data has other classes than the training data: it lacks {some(missing) or 'none'}, and "
            f"only it has {some(unknown) or 'none'}. Give both the same classes, in the same order."
        )
    count = recipe.data.num_classes or (len(ours) if ours else None)
    if count is None and train.images.labels is not None:
        count = int(train.images.labels.max()) + 1
    if count is None and recipe.data.task == "segmentation":
        raise RecipeError("data.num_classes is missing: masks don't tell how many classes there are.")
    if count is not None and count != outputs:
        raise RecipeError(
            f"The data has {count} classes, and the network {outputs} outputs. Set model.num_classes={count} for a "
            "new head, or check data.root."
        )
    for split, name in ((train, "training"), (val, "validation")):
        labels = split.images.labels
        if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < outputs:
            raise RecipeError(
                f"The {name} labels go from {labels.min()} to {labels.max()}, and the network's {outputs} classes "
                f"from 0 to {outputs - 1}. Correct the labels, or model.num_classes."
            )


def _subset(images: Images, candidates: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """`limit` of the candidates (indices), in their order, with about as many of each class."""
    if limit is None or limit >= len(candidates):
        return candidates
    shuffled = np.random.Generator(np.random.PCG64(seed_of(seed, len(candidates)))).permutation(candidates)
    if images.labels is None:
        return np.sort(shuffled[:limit])
    # Images are taken in rounds: the first image of each class, then the second, ...
    rank = np.empty(len(images), dtype=np.int64)
    for label in np.unique(images.labels):
        members = shuffled[images.labels[shuffled] == label]
        rank[members] = np.arange(len(members))
    order = shuffled[np.argsort(rank[shuffled], kind="stable")]
    return np.sort(order[:limit])


def _read(split: Split, report: Callable[[str], None]) -> None:
    """Find images that can't be read, and keep the decoded images in memory if they fit."""
    fits = _decoded_size(split) <= IN_MEMORY
    if not fits and len(split) > _HEADERS:
        return
    if fits and len(split) > 5000:
        report(f"reading {len(split):,} images into memory")
    good, decoded = [], []
    messages = []
    for index in split.chosen.tolist():
        try:
            if fits:
                decoded.append(split.images[index])
            else:
                split.images.readable(index)
            good.append(index)
        except CorruptImageError as error:
            messages.append(str(error))
    if messages and not split.skip_corrupt:
        raise RecipeError(_unreadable(messages))
    if messages:
        report(f"left out {len(messages)} images that can't be read: {some(messages, 3)}")
    split.corrupt = messages
    split.chosen = np.array(good, dtype=np.int64)
    if not fits:
        return
    split.decoded = decoded
    if len({(image.shape, image.dtype) for image, _ in decoded}) == 1 and not isinstance(decoded[0][1], Tensor):
        # In one piece of memory: the loader's processes share it.
        images, targets = torch.stack([image for image, _ in decoded]), torch.tensor([target for _, target in decoded])
        split.decoded = list(zip(images.unbind(), targets.tolist(), strict=True))
        split.stacked = images, targets


def _decoded_size(split: Split) -> float:
    """An estimate of the bytes of all decoded images, from a few of them."""
    sizes = []
    for position in np.unique(np.linspace(0, len(split) - 1, 8).astype(int)):
        try:
            image, target = split.images[int(split.chosen[position])]
        except CorruptImageError:
            continue
        sizes.append(image.nbytes + (target.nbytes if isinstance(target, Tensor) else 0))
    return float(np.mean(sizes)) * len(split) if sizes else 0.0


def _unreadable(messages: list[str]) -> str:
    count = f"{len(messages)} images" if len(messages) > 1 else "An image"
    return (
        f"{count} can't be read: {some(messages, 3)}. Replace or remove them, or go on without them: "
        "data.skip_corrupt=true."
    )
