"""Calibration images: takes them from a loader, and gives them as the arguments of the model's forward."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyconvert.arguments import check_iterable
from dyconvert.errors import ModelError
from dyconvert.surgery.adapters import is_conv
from dyconvert.surgery.example import example_for

# How a map is resized, by its number of spatial dimensions.
_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class Images:
    """Calibration images.

    Args:
        columns: one for each argument of the forward: a tensor `[N, ...]`, a list of N images for a model that takes
            a list, or a value that is the same for all images.
        notes: changes of the images that the user should know.
    """

    def __init__(self, columns: list[Any], count: int, notes: Sequence[str] = ()) -> None:
        self._columns = columns
        self._count = count
        self.notes = list(notes)

    def __len__(self) -> int:
        return self._count

    def part(self, first: int, last: int) -> tuple[Any, ...]:
        """The forward's arguments, as new tensors, for the images from number `first` to `last`, which is excluded."""
        return tuple(_slice(column, first, last, self._count) for column in self._columns)

    def head(self, count: int) -> "Images":
        """The first `count` images."""
        return Images(list(self.part(0, count)), min(count, self._count), self.notes)


def _slice(column: Any, first: int, last: int, count: int) -> Any:
    if isinstance(column, Tensor):
        return column[first:last].clone() if column.dim() and len(column) == count else column.clone()
    if isinstance(column, list) and len(column) == count:
        return [t.clone() for t in column[first:last]]
    return column


def collect_images(data: Iterable[Any], count: int, model: nn.Module, example: Any = None) -> Images:
    """The first `count` images of a loader, as the model's forward takes them.

    If their sizes differ, they are resized to the example's size, or else to the most frequent one, unless the model
    takes a list of images.

    Args:
        data: batches: a tensor `[N, C, *spatial]`, or a tuple or list whose first item is one, or a dict with one; or
            images `[C, *spatial]` one by one or in lists, alone or with labels. Where the forward takes several
            tensors, as the example shows, each batch holds as many.
        example: the forward's arguments, if the user gave them.

    Raises:
        ModelError: there are no images, or they have pixels that the model can't take: NaN, or integers if the
            example has none.
    """
    template = example if isinstance(example, tuple) else () if example is None else (example,)
    takes = [at for at, value in enumerate(template) if _is_images(value)] or [0]
    dims = _dims(model, template[takes[0]] if template else None)
    check_iterable(data)
    images_of: list[list[Tensor]] = [[] for _ in takes]
    listed = False
    for batch in [data] if isinstance(data, Tensor) else data:
        items, as_list = _items(batch, len(takes), dims)
        listed = listed or as_list
        for column, images in zip(images_of, items, strict=True):
            column.extend(images[: count - len(column)])
        if len(images_of[0]) >= count:
            break
    if not images_of[0]:
        raise ModelError("The calibration data holds no images. Give a DataLoader or a tensor of images: `data=...`.")
    listed = isinstance(template[takes[0]], list) if template else listed and _takes_lists(model)
    columns, notes = list(template) or [None], []
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    for at, images in zip(takes, images_of, strict=True):
        shown = template[at] if template else None
        images = [_as_taken(image, number, like, shown) for number, image in enumerate(images)]
        if not listed:
            images, note = _of_one_size(images, shown)
            notes += note
        columns[at] = images if listed else torch.stack(images)
    return Images(columns, len(images_of[0]), notes)


def _takes_lists(model: nn.Module) -> bool:
    """Whether the model takes a list of images, as detection models do."""
    try:
        return isinstance(example_for(model)[0], list)
    except ModelError:
        return False


def _is_images(value: Any) -> bool:
    return (isinstance(value, Tensor) and value.dim() > 0) or (
        isinstance(value, list) and bool(value) and all(isinstance(t, Tensor) for t in value)
    )


def _dims(model: nn.Module, example: Any) -> int:
    """The dimensions of one image: 3 for `[C, H, W]`."""
    if isinstance(example, Tensor):
        return example.dim() - 1
    if isinstance(example, list):
        return example[0].dim()
    first = next((m for m in model.modules() if is_conv(m)), None)
    return len(first.kernel_size) + 1 if first is not None else 3


def _items(batch: Any, columns: int, dims: int) -> tuple[list[list[Tensor]], bool]:
    """The images of a batch for each argument of the forward, and whether the batch was a list of images."""
    values = list(batch.values()) if isinstance(batch, dict) else batch
    if _is_list_of_images(values, dims) and columns == 1:
        return [list(values)], True
    values = list(values) if isinstance(values, tuple | list) else [values]
    if columns == 1:
        nested = list(_nested(values))
        values = [v for v in nested if isinstance(v, Tensor) or _is_list_of_images(v, dims)][:1]
    items, listed = [], False
    for value in values[:columns]:
        if _is_list_of_images(value, dims):
            items.append(list(value))
            listed = True
        elif isinstance(value, Tensor) and value.dim() == dims:
            items.append([value])
        elif isinstance(value, Tensor) and value.dim() > 1:
            items.append(list(value))
    if len(items) < columns:
        what = "a batch of images" if columns == 1 else f"the {columns} tensors that the forward takes"
        raise ModelError(
            f"The calibration data gave a {type(batch).__name__} without {what}. Give batches "
            "[N, C, H, W], or (images, labels), as a DataLoader does."
        )
    return items, listed


def _nested(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, dict):
            yield from _nested(value.values())
        else:
            yield value
            if isinstance(value, tuple | list):
                yield from _nested(value)


def _is_list_of_images(value: Any, dims: int) -> bool:
    if not isinstance(value, tuple | list) or not value:
        return False
    return all(isinstance(t, Tensor) and t.dim() == dims for t in value) and len({t.shape[0] for t in value}) == 1


def _as_taken(image: Tensor, number: int, like: Tensor | None, shown: Any) -> Tensor:
    """An image on the model's device and in its dtype, or in the example's."""
    shown = shown[0] if isinstance(shown, list) else shown
    if not image.is_floating_point() and not image.is_complex():
        if isinstance(shown, Tensor) and shown.dtype == image.dtype:
            return image if like is None else image.to(like.device)
        kind = str(image.dtype).removeprefix("torch.")
        raise ModelError(
            f"The calibration images are {kind}, and the model's weights are real numbers. Give them as the model "
            f"takes them: scaled and normalised, for instance images.float() / 255. A model that does this itself "
            f"takes an example that is {kind} as well: `example=...`."
        )
    if not image.isfinite().all():
        raise ModelError(
            f"Calibration image {number} (from 0) has pixels that are NaN or infinite. Leave it out, or mend how it is "
            "normalised."
        )
    if isinstance(shown, Tensor) and shown.is_floating_point():
        return image.to(like.device if like is not None else shown.device, shown.dtype)
    return image if like is None else image.to(like.device, like.dtype)


def _of_one_size(images: list[Tensor], shown: Any) -> tuple[list[Tensor], list[str]]:
    """The images, resized if their sizes differ, and a note about it."""
    sizes = Counter(tuple(image.shape[1:]) for image in images)
    channels = {image.shape[0] for image in images}
    if len(channels) > 1:
        raise ModelError(f"The calibration images have {sorted(channels)} channels. Give images of one kind.")
    example_size = tuple(shown.shape[2:]) if isinstance(shown, Tensor) else None
    size = example_size if example_size in sizes else sizes.most_common(1)[0][0]
    if len(sizes) == 1:
        return images, []
    other = len(images) - sizes[size]
    note = (
        f"{other} of {len(images)} calibration images were resized to {' x '.join(map(str, size))}, the size that "
        f"{'the example has' if size == example_size else 'most of them have'}"
    )
    return [image if tuple(image.shape[1:]) == size else _resized(image, size) for image in images], [note]


def _resized(image: Tensor, size: tuple[int, ...]) -> Tensor:
    if not image.is_floating_point():
        return _resized(image.float(), size).round().to(image.dtype)
    mode = _MODES[len(size)]
    antialias = {"antialias": True} if mode == "bilinear" else {}
    return F.interpolate(image[None].float(), size, mode=mode, align_corners=False, **antialias)[0].to(image.dtype)
