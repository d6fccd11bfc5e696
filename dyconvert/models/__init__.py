"""From a specifier such as `timm:resnet18` to a model with weights, and a record of where it came from.

| specifier                      | model                                                      |
|--------------------------------|------------------------------------------------------------|
| `resnet50`                     | of torchvision, otherwise of this package                  |
| `torchvision:resnet50`         | any of `torchvision.models.list_models()`                  |
| `timm:resnet18`                | any of `timm.list_models()`                                |
| `builtin:cifar-resnet20`       | of this package; digits-resnet8 comes with its weights     |
| `package.module:factory`       | what the factory returns; the current folder is importable |
| `path/to/file.py:factory`      | the same, from a file                                      |
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torchvision
from torch import nn

from dyconvert.errors import ModelError
from dyconvert.models.arguments import parse_arguments
from dyconvert.models.from_builtin import builtin_model
from dyconvert.models.from_factory import factory_model
from dyconvert.models.from_timm import timm_model
from dyconvert.models.from_torchvision import torchvision_model
from dyconvert.models.heads import replace_head
from dyconvert.models.listing import list_models
from dyconvert.models.source import LIBRARIES, Source, absolute, as_tuples
from dyconvert.models.weights import load_state_dict_into, names_file, read_state_dict

__all__ = [
    "LIBRARIES",
    "Source",
    "build",
    "create",
    "list_models",
    "load_state_dict_into",
    "parse_arguments",
    "read_state_dict",
]

_OF_LIBRARY = {"torchvision": torchvision_model, "timm": timm_model, "builtin": builtin_model}


def create(
    specifier: str,
    weights: str = "default",
    arguments: Mapping[str, Any] | None = None,
    *,
    num_classes: int | None = None,
    new_head: bool = False,
) -> tuple[nn.Module, Source]:
    """Build a model and give it its weights.

    Args:
        specifier: see the table above.
        weights: "default" (the library's default pretrained set; of a factory, what it returns), "none"
            (random; of a factory, again what it returns), the name of a weight set (torchvision's
            "IMAGENET1K_V2", a timm tag), or a file that `read_state_dict` can read; for a builtin model also the
            folder that holds its file under the published name. A file named as torchvision names its own is that
            weight set, with the settings that belong to it.
        arguments: passed to the model's builder; lists become tuples, so that JSON can keep them.
        num_classes: where the model has another number of classes once it has its weights, it gets a new,
            untrained head; the source says so.
        new_head: a new, untrained head in any case.

    Returns:
        The model, on the CPU and in eval mode, and its source.

    Raises:
        ModelError: unknown model, weights or argument; a failed download; a file that doesn't fit; a new
            head is asked for, and there is no telling which layer the old one is.
    """
    arguments = {name: as_tuples(value) for name, value in (arguments or {}).items()}
    model, source = _make(specifier, weights, arguments, num_classes, load=True)
    if new_head:
        replace_head(model, num_classes, always=True)
    return model, source


def build(source: Source) -> nn.Module:
    """Build the architecture that `create` made, on the CPU, without its weights and without a download.

    A factory is called again, and does what it does.

    Raises:
        ModelError: as in `create`.
    """
    model, _ = _make(source.specifier, source.weights or "none", source.arguments, source.num_classes, load=False)
    return model


def _make(
    specifier: str, weights: str, arguments: dict, num_classes: int | None, load: bool
) -> tuple[nn.Module, Source]:
    chosen: str | Path = weights
    if names_file(weights):
        chosen = absolute(weights)
        if load and not chosen.exists():
            raise ModelError(f"There is no weights file {chosen}; give the path of an existing file.")
    head, colon, name = specifier.partition(":")
    if not colon:
        if specifier.endswith(".py"):
            raise ModelError(f"{specifier} names a file, but no factory in it; write `{specifier}:FACTORY`.")
        head, name = "torchvision" if specifier in torchvision.models.list_models() else "builtin", specifier
    if head in LIBRARIES:
        model, source = _OF_LIBRARY[head](name, chosen, arguments, load)
    else:
        model, source = factory_model(specifier, chosen, arguments, load)
    if num_classes is not None:
        replace_head(model, num_classes)
        source = replace(source, num_classes=num_classes)
    return model.eval(), source
