"""Batches that depend only on (seed, epoch, position): not on workers, processes, or where a run was resumed."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors

from dyconvert.errors import RecipeError
from dyconvert.finetuning.data.augment import Transform, train_transform, val_transform
from dyconvert.finetuning.data.datasets import Part
from dyconvert.finetuning.data.views import Views, has_views
from dyconvert.finetuning.recipes.recipe import Recipe
from dyconvert.finetuning.recipes.schema import Data
from dyconvert.finetuning.training.randomness import seed_of

# What pads the validation images of a process that has fewer than the others; its target doesn't count.
PADDING = -1
# The target of such an image; cross entropy's own value for targets that don't count.
IGNORED = -100

Key = tuple[int, int]


# Images `[N, C, H, W]` and targets `[N]` or `[N, H, W]`; then, where they are kept, a teacher's logits `[N, classes]`
# and features `[N, F]`, in float16.
Batch = tuple[Tensor, ...]


class Kept(NamedTuple):
    """A teacher's outputs for the numbered views: logits `[views, images, classes]`, features `[views, images, F]`."""

    logits: Tensor
    features: Tensor | None = None


class EpochBatches(Sampler[list[Key]]):
    """Batches of (epoch, position), in an order of each epoch's own; incomplete batches are left out.

    Args:
        count: number of images.
        batch: images per process and batch.
        per_epoch: batches per epoch.
        rank, world: this process, and how many there are. Together they see the same images as one would.
        epoch, done: where to start: batches of that epoch that were done before.
    """

    def __init__(
        self, count: int, batch: int, per_epoch: int, seed: int, rank: int, world: int, epoch: int = 0, done: int = 0
    ) -> None:
        self.count, self.batch, self.per_epoch = count, batch, per_epoch
        self.seed, self.rank, self.world = seed, rank, world
        self.epoch, self.done = epoch, done
        # Lightning tells a loader's `sampler` the epoch.
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Lightning's announcement of the epoch."""
        if epoch != self.epoch:
            self.epoch, self.done = epoch, 0

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, done = self.epoch, self.done
        order = np.random.Generator(np.random.PCG64(seed_of(self.seed, epoch))).permutation(self.count)
        for index in range(done, self.per_epoch):
            start = (index * self.world + self.rank) * self.batch
            yield [(epoch, int(position)) for position in order[start : start + self.batch]]


class InOrder(Sampler[list[Key]]):
    """Batches of all images in their order, as many in every process."""

    def __init__(self, count: int, batch: int, rank: int, world: int) -> None:
        each = -(-count // world)
        positions = [*range(rank, count, world)]
        positions += [PADDING] * (each - len(positions))
        self.batches = [[(0, each) for each in positions[i : i + batch]] for i in range(0, each, batch)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)


class Prepared(Dataset[Any]):
    """Images and targets as the network takes them, but for the normalisation, by (epoch, position).

    Args:
        training: whether images are augmented, as the recipe says.
        kept: a teacher's outputs, to go with the images.

    Attributes:
        views: crops and flips a batch; None where images go one by one, for they differ in size, or aren't in memory.
    """

    def __init__(self, part: Part, seed: int, data: Data, training: bool, kept: Kept | None = None) -> None:
        self.part, self.seed = part, seed
        self.transform: Transform = train_transform(data) if training else val_transform(data)
        self.views, self.kept = None, kept
        if part.stacked is not None and has_views(data, part.stacked[0].shape):
            self.views = Views(data.augment, seed, data.views) if training else Views("none", seed)
        elif training and data.views is not None:
            raise RecipeError(
                f"data.views needs images that fit into memory, all of {data.size} x {data.size}, and these don't. Set "
                "data.views=null."
            )
        self.segmentation = data.task == "segmentation"
        self.ignored = data.ignore_index if self.segmentation else IGNORED

    def __len__(self) -> int:
        return len(self.part)

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Tensor, Any]] | Batch:
        if self.views is not None:
            return self._together(keys)
        # Transforms draw from the global generator, which in the training process is the network's.
        generator = torch.default_generator
        state = generator.get_state()
        try:
            return [self._get(generator, *key) for key in keys]
        finally:
            generator.set_state(state)

    def _together(self, keys: Sequence[Key]) -> Batch:
        images, targets = self.part.stacked
        epochs, positions = np.array(keys).T
        taken = torch.from_numpy(np.maximum(positions, 0))
        batch = (
            self.views(images[taken], epochs, positions),
            targets[taken].masked_fill(torch.from_numpy(positions == PADDING), self.ignored),
        )
        if self.kept is None:
            return batch
        which = torch.from_numpy(self.views.which(epochs, positions))
        return *batch, *(each[which, taken] for each in self.kept if each is not None)

    def numbered(self, view: int, positions: Sequence[int]) -> Tensor:
        """The numbered view of these images, `[N, C, H, W]`."""
        taken = np.asarray(positions)
        return self.views.numbered(self.part.stacked[0][torch.from_numpy(taken)], np.full(len(taken), view), taken)

    def _get(self, generator: torch.Generator, epoch: int, position: int) -> tuple[Tensor, Any]:
        image, target = self.part.get(max(position, 0))
        generator.manual_seed(seed_of(self.seed, epoch, position))
        if self.segmentation:
            image, target = self.transform(tv_tensors.Image(image), tv_tensors.Mask(target))
            image, target = image.as_subclass(Tensor), target.as_subclass(Tensor).long()
        else:
            image = self.transform(image)
        if position == PADDING:
            target = torch.full_like(target, self.ignored) if self.segmentation else self.ignored
        return image, target

    def collate(self, samples: list[tuple[Tensor, Any]] | Batch) -> Batch:
        """Images `[N, C, H, W]`, uint8 or floats of 0 to 1; targets `[N]` or `[N, H, W]`."""
        if isinstance(samples, tuple):
            return samples
        images, targets = zip(*samples, strict=True)
        if not self.segmentation:
            return torch.stack(images), torch.tensor(targets)
        height, width = (max(image.shape[dim] for image in images) for dim in (-2, -1))
        if all(tuple(image.shape[-2:]) == (height, width) for image in images):
            return torch.stack(images), torch.stack(targets)
        # Whole validation images differ in size.
        batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
        masks = targets[0].new_full((len(images), height, width), self.ignored)
        for index, (image, mask) in enumerate(samples):
            batch[index, :, : image.shape[1], : image.shape[2]] = image
            masks[index, : mask.shape[0], : mask.shape[1]] = mask
        return batch, masks


def train_loader(
    recipe: Recipe, part: Part, rank: int, world: int, epoch: int = 0, done: int = 0, kept: Kept | None = None
) -> DataLoader[Any]:
    """The loader of this process's share of every training batch; it starts at batch `done` of `epoch`."""
    train = recipe.train
    batch = train.batch // (world * train.accumulate)
    sampler = EpochBatches(
        len(part), batch, steps_per_epoch(recipe, part) * train.accumulate, train.seed, rank, world, epoch, done
    )
    return _loader(Prepared(part, train.seed, recipe.data, training=True, kept=kept), sampler, recipe)


def val_loader(recipe: Recipe, part: Part, rank: int, world: int) -> DataLoader[Any]:
    """The loader of this process's share of the validation images."""
    batch = recipe.train.eval_batch or recipe.train.batch // world
    sampler = InOrder(len(part), batch, rank, world)
    return _loader(Prepared(part, recipe.train.seed, recipe.data, training=False), sampler, recipe)


def steps_per_epoch(recipe: Recipe, part: Part) -> int:
    """Optimizer steps of an epoch; what doesn't fill a batch waits for another epoch's order."""
    return len(part) // recipe.train.batch


def _loader(dataset: Prepared, sampler: Sampler[Any], recipe: Recipe) -> DataLoader[Any]:
    workers = recipe.data.workers
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=dataset.collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
