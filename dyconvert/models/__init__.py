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

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyconvert.errors import ModelError
from dyconvert.models.arguments import parse_arguments
from dyconvert.models.limited import untrusted
from dyconvert.models.listing import list_models, unknown_model
from dyconvert.models.source import LIBRARIES, Source, absolute, as_tuples, is_weights_name, names_file

if TYPE_CHECKING:
    from torch import nn

    from dyconvert.models.weights import load_state_dict_into, read_state_dict

__all__ = [
    "LIBRARIES",
    "Source",
    "build",
    "build_without_values",
    "check",
    "check_size",
    "create",
    "list_models",
    "load_state_dict_into",
    "names_code",
    "parse_arguments",
    "read_state_dict",
    "split",
    "untrusted",
]


def create(
    specifier: str,
    weights: str = "default",
    arguments: Mapping[str, Any] | None = None,
    *,
    num_classes: int | None = None,
    new_head: bool = False,
) -> "tuple[nn.Module, Source]":
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
        from dyconvert.models.heads import replace_head

        replace_head(model, num_classes, always=True)
    return model, source


def build(source: Source) -> "nn.Module":
    """Build the architecture that `create` made, on the CPU, without its weights and without a download.

    A factory is called again, and does what it does.

    Raises:
        ModelError: as in `create`.
    """
    model, _ = _make(source.specifier, source.weights or "none", source.arguments, source.num_classes, load=False)
    return model


def build_without_values(source: Source, tensors: int) -> "nn.Module":
    """Build the architecture of a library's model that a file asks for: its parameters are on the meta device.

    Args:
        tensors: how many the file has.

    Raises:
        ModelError: as in `create`; or the model has far more parts than the file can fill.
    """
    from dyconvert.models.bounded import TooLargeError, bounded, lost_values

    check_size(source)
    try:
        with bounded(tensors, values=False):
            model = build(source)
        if not lost_values(model):
            return model
    except TooLargeError:
        raise
    except ModelError:
        pass
    # A few compute something of their parameters when they are made: SSD looks at its backbone's channels.
    with bounded(tensors, values=True):
        return build(source)


def check_size(source: Source) -> None:
    """Refuse arguments in a file that make a library build tensors of gigabytes, such as tables of positions.

    Raises:
        ModelError: they do.
    """
    from dyconvert.models.bounded import check_tensors

    # Without arguments it is as large as its authors made it.
    if source.arguments and not source.runs_user_code:
        check_tensors(lambda: build(source))


def names_code(specifier: str) -> bool:
    """Whether `create` would run code that the specifier names, and not a library's."""
    head, colon, _ = specifier.partition(":")
    return bool(colon) and head not in LIBRARIES


def _make(
    specifier: str, weights: str, arguments: dict[str, Any], num_classes: int | None, load: bool
) -> "tuple[nn.Module, Source]":
    chosen: str | Path = weights
    if names_file(weights):
        chosen = absolute(weights)
        if load and not chosen.exists():
            raise ModelError(f"There is no weights file {chosen}; give the path of an existing file.")
    head, name = split(specifier)
    model, source = _builder(head)(name, chosen, arguments, load)
    if num_classes is not None:
        from dyconvert.models.heads import replace_head

        replace_head(model, num_classes)
        source = replace(source, num_classes=num_classes)
    return model.eval(), source


def check(specifier: str, weights: str = "default") -> None:
    """Refuse what can be seen to be no model, or no weights file, before the libraries are imported.

    Raises:
        ModelError: the library has no model of the name, or there is no such file.
    """
    if names_file(weights) and not absolute(weights).exists():
        raise ModelError(f"There is no weights file {absolute(weights)}; give the path of an existing file.")
    head, name = split(specifier)
    if head is not None:
        base = name.partition(".")[0] if head == "timm" else name
        if base not in list_models(head)[head]:
            raise unknown_model(base)


def split(specifier: str) -> tuple[str | None, str]:
    """The library that a specifier names and the name within; for a factory, None and the whole specifier.

    Raises:
        ModelError: it names no library, and isn't of the form of a factory.
    """
    head, colon, name = specifier.partition(":")
    if colon:
        return (head, name) if head in LIBRARIES else (None, specifier)
    if is_weights_name(specifier):
        raise ModelError(
            f"{specifier} holds weights, and a model is built by code: torchvision:NAME, timm:NAME or "
            f"path/to/file.py:FACTORY. Name that model, and give it `weights={specifier}`."
        )
    if specifier.endswith(".py"):
        raise ModelError(f"{specifier} names a file, but no factory in it; write `{specifier}:FACTORY`.")
    return ("torchvision" if specifier in list_models("torchvision")["torchvision"] else "builtin"), specifier


def _builder(library: str | None) -> Callable[..., "tuple[nn.Module, Source]"]:
    # Each of them imports its library, which takes from half a second to two.
    if library == "torchvision":
        from dyconvert.models.from_torchvision import torchvision_model

        return torchvision_model
    if library == "timm":
        from dyconvert.models.from_timm import timm_model

        return timm_model
    if library == "builtin":
        from dyconvert.models.from_builtin import builtin_model

        return builtin_model
    from dyconvert.models.from_factory import factory_model

    return factory_model


def __getattr__(name: str) -> Any:
    if name in ("load_state_dict_into", "read_state_dict"):  # their module imports torch
        from dyconvert.models import weights

        return getattr(weights, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
