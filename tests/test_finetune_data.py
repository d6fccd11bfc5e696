"""Batches of training images: cropped and flipped together, the same whoever asks for them."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dyconvert import load_recipe
from dyconvert.errors import RecipeError
from dyconvert.finetuning.data.datasets import load_split
from dyconvert.finetuning.data.loading import Prepared, train_loader, val_loader
from dyconvert.finetuning.data.views import Views
from dyconvert.finetuning.training.randomness import seed_of, seeds_of

IMAGES = torch.randint(1, 256, (64, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
POSITIONS = np.arange(64)


def test_seeds_of_arrays_are_those_of_numbers():
    epochs, positions = np.array([0, 3, 7]), np.array([5, -1, 2**40])
    assert seeds_of(9, epochs, positions).tolist() == [
        seed_of(9, int(e), int(p)) for e, p in zip(epochs, positions, strict=True)
    ]


@pytest.mark.parametrize(
    ("preset", "padding", "flips"), [("none", 0, 0), ("flip", 0, 1), ("shift", 1, 0), ("cifar", 4, 1)]
)
def test_every_view_is_a_crop_of_the_padded_image(preset, padding, flips):
    found = {}
    for epoch in range(40):
        seen = Views(preset, 1)(IMAGES, np.full(64, epoch), POSITIONS)
        assert seen.shape == IMAGES.shape
        assert seen.dtype == torch.uint8
        for image, view in zip(F.pad(IMAGES, [padding] * 4), seen, strict=True):
            which = [
                (down, right, flip)
                for down in range(2 * padding + 1)
                for right in range(2 * padding + 1)
                for flip in range(flips + 1)
                if torch.equal(_flipped(image[:, down : down + 8, right : right + 8], flip), view)
            ]
            assert len(which) == 1
            found[which[0]] = found.get(which[0], 0) + 1
    # 2560 draws, evenly over at most 162 views: 16 each, with a standard deviation of 4.
    expected = 2560 / ((2 * padding + 1) ** 2 * (flips + 1))
    assert len(found) == (2 * padding + 1) ** 2 * (flips + 1)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in found.values())


def _flipped(image, flip):
    return image.flip(2) if flip else image


def test_a_view_depends_on_nothing_but_seed_epoch_and_position():
    whole = Views("cifar", 1)(IMAGES, np.full(64, 2), POSITIONS)
    chosen = np.array([40, 3, 17])
    assert torch.equal(Views("cifar", 1)(IMAGES[chosen], np.full(3, 2), chosen), whole[chosen])
    for seed, epoch in ((2, 2), (1, 3)):
        assert not torch.equal(Views("cifar", seed)(IMAGES, np.full(64, epoch), POSITIONS), whole)


def test_numbered_views_are_few_and_the_same_for_every_seed():
    kinds = {image: set() for image in POSITIONS}
    for seed in (1, 2):
        views = Views("cifar", seed, count=3)
        for epoch in range(6):
            which = views.which(np.full(64, epoch), POSITIONS)
            seen = views(IMAGES, np.full(64, epoch), POSITIONS)
            assert torch.equal(seen, views.numbered(IMAGES, which, POSITIONS))
            for image, view in zip(POSITIONS, seen, strict=True):
                kinds[image].add(view.numpy().tobytes())
    # Two of an image's three views may be alike by chance: one pair in 162.
    assert sum(len(found) for found in kinds.values()) >= 3 * 64 - 5
    assert max(len(found) for found in kinds.values()) == 3
    # An image's views follow one another, from a first one that each seed draws for each image.
    first = Views("cifar", 1, 3).which(np.zeros(64, int), POSITIONS)
    assert set(first) == {0, 1, 2}
    assert ((Views("cifar", 1, 3).which(np.ones(64, int), POSITIONS) - first) % 3 == 1).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_from_any_process(workers):
    recipe = load_recipe(
        "quickstart",
        [
            "data.dataset=fake",
            "data.images=40",
            "data.size=8",
            "data.augment=cifar",
            "train.batch=16",
            f"data.workers={workers}",
        ],
    )
    part = load_split(recipe, "train", 10, print)
    prepared = Prepared(part, recipe.train.seed, recipe.data, training=True)
    assert prepared.views.padding == 4
    for epoch in (0, 5):
        first, second = train_loader(recipe, part, 0, 1, epoch)
        assert first[0].shape == (16, 1, 8, 8)
        [resumed] = train_loader(recipe, part, 0, 1, epoch, done=1)
        assert torch.equal(resumed[0], second[0])
        assert torch.equal(resumed[1], second[1])
        halves = [next(iter(train_loader(recipe, part, rank, 2, epoch))) for rank in (0, 1)]
        assert torch.equal(torch.cat([half[0] for half in halves]), first[0])
    targets = [target for index in range(40) for target in [part.get(index)[1]]]
    assert torch.cat([batch[1] for batch in val_loader(recipe, part, 0, 1)]).tolist() == targets


def test_images_that_need_resizing_go_one_by_one():
    recipe = load_recipe("quickstart", ["data.dataset=fake", "data.images=20", "data.size=8", "data.resize=12"])
    part = load_split(recipe, "train", 10, print)
    prepared = Prepared(part, 0, recipe.data, training=True)
    assert prepared.views is None
    assert prepared.collate(prepared.__getitems__([(0, 1), (0, 2)]))[0].shape == (2, 1, 8, 8)


@pytest.mark.parametrize("limit", [None, 200])
def test_images_are_held_out_of_the_training_images(limit):
    recipe = load_recipe("quickstart", ["data.holdout=100", f"data.limit_train={limit or 'null'}"])
    train, val = (load_split(recipe, part, 10, print) for part in ("train", "val"))
    assert len(val) == 100
    assert not set(train.chosen) & set(val.chosen)
    assert len(train) == (limit or len(train.images) - 100)
    assert np.bincount(val.images.labels[val.chosen]).tolist() == [10] * 10


def test_holding_out_everything_leaves_nothing():
    recipe = load_recipe("quickstart", ["data.holdout=5000"])
    with pytest.raises(RecipeError, match=r"data\.holdout = 5000 leaves none"):
        load_split(recipe, "train", 10, print)
