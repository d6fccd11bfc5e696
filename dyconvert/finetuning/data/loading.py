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
from dyconvert.finetuning.data.datasets import Split
from dyconvert.finetuning.data.views import Views, has_views
from dyconvert.finetuning.recipes.recipe import Recipe
from dyconvert.finetuning.recipes.schema import Data
from dyconvert.finetuning.training.randomness import seed_of

# The position of an image that fills up a validation batch, in a process with fewer images than others. Its target
# doesn't count.
PADDING = -1
# The target of such an image: the default that cross entropy ignores.
IGNORED = -100

Key = tuple[int, int]


# Images `[N, C, H, W]` and targets `[N]` or `[N, H, W]`; then, with a teacher's cache, its logits `[N, classes]` and
# features `[N, F]`, in float16.
Batch = tuple[Tensor, ...]


class TeacherOutputs(NamedTuple):
    """A teacher's outputs for the numbered views: logits `[views, images, classes]`, features `[views, images, F]`."""

    logits: Tensor
    features: Tensor | None = None


class EpochBatches(Sampler[list[Key]]):
    """Batches of (epoch, position), in another order every epoch; incomplete batches are left out.

    Args:
        count: number of images.
        batch: images per process and batch.
        per_epoch: batches per epoch.
        rank, world: this process's number, and the number of processes. Together they see the images that a single
            process would.
        epoch, done: where to start: after `done` batches of `epoch`.
    """

    def __init__(
        self, count: int, batch: int, per_epoch: int, seed: int, rank: int, world: int, epoch: int = 0, done: int = 0
    ) -> None:
        self.count, self.batch, self.per_epoch = count, batch, per_epoch
        self.seed, self.rank, self.world = seed, rank, world
        self.epoch, self.done = epoch, done
        # Lightning calls set_epoch on the loader's `sampler`.
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
    """Batches of all images in their order, equally many in every process."""

    def __init__(self, count: int, batch: int, rank: int, world: int) -> None:
        per_process = -(-count // world)
        positions = [*range(rank, count, world)]
        positions += [PADDING] * (per_process - len(positions))
        self.batches = [[(0, position) for position in positions[i : i + batch]] for i in range(0, per_process, batch)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)


class Prepared(Dataset[Any]):
    """Images and targets by (epoch, position), as the network takes them except that they aren't normalised yet.

    Args:
        training: whether images are augmented, as the recipe says.
        teacher_outputs: a cached teacher's, which batches then include.

    Attributes:
        views: crops and flips whole batches; None if images are transformed one by one, because their sizes differ or
            they aren't in memory.
    """

    def __init__(
        self, split: Split, seed: int, data: Data, training: bool, teacher_outputs: TeacherOutputs | None = None
    ) -> None:
        self.split, self.seed = split, seed
        self.transform: Transform = train_transform(data) if training else val_transform(data)
        self.views, self.teacher_outputs = None, teacher_outputs
        if split.stacked is not None and has_views(data, split.stacked[0].shape):
            self.views = Views(data.augment, seed, data.views) if training else Views("none", seed)
        elif training and data.views is not None:
            raise RecipeError(
                f"data.views needs images that fit into memory, all of {data.size} x {data.size}, and these don't. Set "
                "data.views=null."
            )
        self.segmentation = data.task == "segmentation"
        self.ignored = data.ignore_index if self.segmentation else IGNORED

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Tensor, Any]] | Batch:
        if self.views is not None:
            return self._batch_of_views(keys)
        # Transforms draw from torch's global generator; in the training process, dropout draws from it too.
        generator = torch.default_generator
        state = generator.get_state()
        try:
            return [self._get(generator, *key) for key in keys]
        finally:
            generator.set_state(state)

    def _batch_of_views(self, keys: Sequence[Key]) -> Batch:
        images, targets = self.split.stacked
        epochs, positions = np.array(keys).T
        indices = torch.from_numpy(np.maximum(positions, 0))
        batch = (
            self.views(images[indices], epochs, positions),
            targets[indices].masked_fill(torch.from_numpy(positions == PADDING), self.ignored),
        )
        if self.teacher_outputs is None:
            return batch
        which = torch.from_numpy(self.views.which(epochs, positions))
        return *batch, *(outputs[which, indices] for outputs in self.teacher_outputs if outputs is not None)

    def numbered(self, view: int, positions: Sequence[int]) -> Tensor:
        """The numbered view of these images, `[N, C, H, W]`."""
        indices = np.asarray(positions)
        return self.views.numbered(
            self.split.stacked[0][torch.from_numpy(indices)], np.full(len(indices), view), indices
        )

    def _get(self, generator: torch.Generator, epoch: int, position: int) -> tuple[Tensor, Any]:
        image, target = self.split.get(max(position, 0))
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
    recipe: Recipe,
    split: Split,
    rank: int,
    world: int,
    epoch: int = 0,
    done: int = 0,
    teacher_outputs: TeacherOutputs | None = None,
) -> DataLoader[Any]:
    """The loader of this process's share of every training batch; it starts at batch `done` of `epoch`."""
    train = recipe.train
    batch = train.batch // (world * train.accumulate)
    sampler = EpochBatches(
        len(split), batch, steps_per_epoch(recipe, split) * train.accumulate, train.seed, rank, world, epoch, done
    )
    return _loader(
        Prepared(split, train.seed, recipe.data, training=True, teacher_outputs=teacher_outputs), sampler, recipe
    )


def val_loader(recipe: Recipe, split: Split, rank: int, world: int) -> DataLoader[Any]:
    """The loader of this process's share of the validation images."""
    batch = recipe.train.eval_batch or recipe.train.batch // world
    sampler = InOrder(len(split), batch, rank, world)
    return _loader(Prepared(split, recipe.train.seed, recipe.data, training=False), sampler, recipe)


def steps_per_epoch(recipe: Recipe, split: Split) -> int:
    """Optimizer steps of an epoch. Images that don't fill a batch are left out; another epoch has another order."""
    return len(split) // recipe.train.batch


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
