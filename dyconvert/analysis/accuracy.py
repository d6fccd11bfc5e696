"""How many images are classified right, and how certain that is: counts, intervals, classes, confusions."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from pydantic import BaseModel
from torch import Tensor

# 95 % of a normal distribution lie within this many standard deviations.
Z = 1.96
# A difference is said to be one if chance alone would make it as large less often than this.
CERTAIN = 0.05
# Pairs of classes that are listed.
CONFUSIONS = 10


class Share(BaseModel):
    """`right` of `images`; `low` and `high` are the ends of Wilson's 95 % interval. All three shares in percent."""

    right: int
    images: int
    percent: float
    low: float
    high: float

    @classmethod
    def of(cls, right: int, images: int) -> "Share":
        p, correction = right / images, Z * Z / images
        middle = (p + correction / 2) / (1 + correction)
        half = Z * math.sqrt(p * (1 - p) / images + correction / (4 * images)) / (1 + correction)
        low, high = max(middle - half, 0.0), min(middle + half, 1.0)
        return cls(right=right, images=images, percent=100 * p, low=100 * low, high=100 * high)


class ClassAccuracy(BaseModel):
    """The accuracy on one class's images; `original` is None where there is no original."""

    name: str
    model: Share
    original: Share | None = None


class Confusion(BaseModel):
    """How often images of one class are taken for another, by the model and by the original."""

    label: str
    taken_for: str
    model: int
    original: int | None = None


class Accuracy(BaseModel):
    """Top-1 over all images.

    Attributes:
        model, original: shares; `original` is None where there is none.
        only_model, only_original: images that only one of the two has right.
        chance: how often chance alone would part the two as far (McNemar's test, exact); None without an original.
        classes: those that have images, in their order.
        confusions: the pairs of classes that the model confuses most.
    """

    model: Share
    original: Share | None = None
    only_model: int = 0
    only_original: int = 0
    chance: float | None = None
    classes: list[ClassAccuracy] = []
    confusions: list[Confusion] = []

    @property
    def differs(self) -> bool:
        """Whether model and original differ by more than chance explains."""
        return self.chance is not None and self.chance < CERTAIN


def accuracy(labels: Tensor, predicted: Tensor, original: Tensor | None, classes: Sequence[str]) -> Accuracy:
    """Compare predictions with labels, and with the original's predictions.

    Args:
        labels, predicted, original: `[N]`, whole numbers below the number of classes.
        classes: their names.
    """
    right = predicted == labels
    result = Accuracy(model=Share.of(int(right.sum()), len(labels)))
    other = None
    if original is not None:
        other = original == labels
        result.original = Share.of(int(other.sum()), len(labels))
        result.only_model, result.only_original = int((right & ~other).sum()), int((other & ~right).sum())
        result.chance = _sign_test(result.only_model, result.only_original)
    for number, name in enumerate(classes):
        of_class = labels == number
        if images := int(of_class.sum()):
            theirs = None if other is None else Share.of(int(other[of_class].sum()), images)
            result.classes.append(
                ClassAccuracy(name=name, model=Share.of(int(right[of_class].sum()), images), original=theirs)
            )
    ours = _confused(labels, predicted)
    before = None if original is None else _confused(labels, original)
    for (label, said), count in sorted(ours.items(), key=lambda item: (-item[1], item[0]))[:CONFUSIONS]:
        result.confusions.append(
            Confusion(
                label=classes[label],
                taken_for=classes[said],
                model=count,
                original=None if before is None else before[label, said],
            )
        )
    return result


def _confused(labels: Tensor, predicted: Tensor) -> Counter[tuple[int, int]]:
    wrong = torch.stack([labels, predicted], 1)[labels != predicted]
    return Counter((label, said) for label, said in wrong.tolist())


def _sign_test(first: int, second: int) -> float:
    """How often a fair coin falls as unevenly as `first` to `second`, or more so."""
    count, least = first + second, min(first, second)
    if count > 2000:  # the normal distribution is as good, and factorials grow
        return math.erfc(max(abs(first - second) - 1, 0) / math.sqrt(2 * count))
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(least + 1)) / 2**count) if count else 1.0
