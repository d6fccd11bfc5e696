"""How a library's model wants its images, as the library says; `dyconvert.preprocessing`."""

import math
from typing import Any

from torch import nn

from dyconvert.arguments import check_module
from dyconvert.errors import ModelError
from dyconvert.marks import preprocessing_of, source_of
from dyconvert.models.source import Source
from dyconvert.transforms import Preprocessing

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def preprocessing(model: nn.Module) -> Preprocessing:
    """The preprocessing of images for `model`: call the result with a PIL image or a file.

    >>> images = dyconvert.preprocessing(model).batch(["cat.jpg", "dog.jpg"])  # doctest: +SKIP
    >>> model(images).softmax(1)  # doctest: +SKIP

    Args:
        model: what :func:`~dyconvert.load` returned. Fine-tuned models were saved with their recipe's preprocessing and
            class names, others have what their library says of the weights they were made from.

    Raises:
        ModelError: neither is known.
    """
    check_module(model)
    found = preprocessing_of(model)
    if found is None and (source := source_of(model)) is not None:
        found = preprocessing_for(source)
    if found is None:
        raise ModelError(
            f"{type(model).__name__} doesn't say how its images are prepared. Make a dyconvert.Preprocessing, and save "
            "it with the model: dyconvert.save(model, directory, preprocessing=...)."
        )
    return found


def preprocessing_for(source: Source) -> Preprocessing | None:
    """The preprocessing that the library records for the model and its weights; None if it has none."""
    library, _, name = source.specifier.partition(":")
    if library == "torchvision":
        found = _of_torchvision(name, source)
    elif library == "timm":
        found = _of_timm(name, source)
    elif library == "builtin":
        found = _of_builtin(name)
    else:
        found = None
    if found is not None and source.num_classes is not None and source.num_classes != len(found.classes or ()):
        return found.model_copy(update={"classes": None})  # those of the head that was replaced
    return found


def _of_torchvision(name: str, source: Source) -> Preprocessing | None:
    from torchvision.models import get_model_weights

    sets = get_model_weights(name)
    chosen = sets.__members__.get(source.weights or "DEFAULT") or getattr(sets, "DEFAULT", None)
    transforms: Any = chosen.transforms() if chosen is not None else None
    crop, resize = getattr(transforms, "crop_size", None), getattr(transforms, "resize_size", None)
    if not crop or not resize or len(source.input_size or (0,) * 3) != 3:
        return None  # detection, segmentation and video have other inputs than one image of one size
    sides = (crop[0], crop[-1])
    return Preprocessing(
        size=(3, *sides),
        resize=resize[0] if len(resize) == 1 else tuple(resize),
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        classes=_names((chosen.meta if chosen else {}).get("categories"), source.arguments),
    )


def _of_timm(name: str, source: Source) -> Preprocessing | None:
    from dyconvert.models.listing import import_timm

    tag = source.weights if source.weights not in (None, "default") and "." not in str(source.weights) else ""
    cfg = import_timm().get_pretrained_cfg(f"{name}.{tag}" if tag else name)
    if cfg is None or cfg.input_size is None or source.input_size is None or source.input_size[0] not in (1, 3):
        return None
    _, height, width = source.input_size
    # As timm.data.create_transform has it for crop_mode "center".
    shorter = tuple(math.floor(side / cfg.crop_pct) for side in (height, width))
    names = None
    if cfg.num_classes == 1000:
        from torchvision.models import ResNet18_Weights

        names = ResNet18_Weights.DEFAULT.meta["categories"]  # ImageNet's, in the order that all use
    channels = source.input_size[0]
    return Preprocessing(
        size=(channels, height, width),
        resize=shorter[0] if shorter[0] == shorter[1] else shorter,
        interpolation=cfg.interpolation if cfg.interpolation in ("bilinear", "bicubic", "nearest") else "bilinear",
        mean=tuple(cfg.mean)[:channels] if len(cfg.mean) >= channels else tuple(cfg.mean) * channels,
        std=tuple(cfg.std)[:channels] if len(cfg.std) >= channels else tuple(cfg.std) * channels,
        classes=_names(names, source.arguments),
    )


def _of_builtin(name: str) -> Preprocessing | None:
    if name == "digits-resnet8":
        return Preprocessing(size=(1, 8, 8), resize=8, keep=True, mean=(0.0,), std=(1.0,), classes=tuple("0123456789"))
    if name == "tiny-resnet8":  # it takes bytes, not normalised
        bytes_ = (1 / 255,) * 3
        return Preprocessing(
            size=(3, 32, 32), resize=32, keep=True, on="tensor", mean=(0.0,) * 3, std=bytes_, classes=_CIFAR10
        )
    if name.startswith("cifar-resnet"):
        return Preprocessing(size=(3, 32, 32), resize=32, keep=True, on="tensor", classes=_CIFAR10)
    return None


def _names(names: Any, arguments: dict[str, Any]) -> tuple[str, ...] | None:
    if not names or arguments.get("num_classes", len(names)) != len(names):
        return None
    return tuple(names)
