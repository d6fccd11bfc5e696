"""Models and images as commands name them: saved directories, models that `convert` takes, folders."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from dyconvert import checkpoint, models
from dyconvert.analysis.images import ImageSet, image_files, image_size, read_images
from dyconvert.cli.common import parse_device
from dyconvert.cli.options import name_of, parse_numbers
from dyconvert.console import warn
from dyconvert.errors import ModelError
from dyconvert.marks import mark_source, plan_of, preprocessing_of, source_of
from dyconvert.models.preprocess import preprocessing_for
from dyconvert.surgery.example import example_for
from dyconvert.surgery.plan import Plan
from dyconvert.surgery.planning import STEM


@dataclass
class Opened:
    """A model, its name for messages, where it came from, and the size of its input if that is known."""

    model: nn.Module
    name: str
    source: "models.Source | None"
    saved: bool
    size: tuple[int, ...] | None


def restored(directory: Path, trust_code: bool, factory: str | None) -> nn.Module:
    """A saved model; its static one is built by `--model`, if that is given, which is trusted for being named."""
    if factory is None:
        return checkpoint.load(directory, trust_code=trust_code)
    directory = checkpoint.local(directory)
    saved = checkpoint.source_of(directory)
    arguments = {} if saved is None else saved.arguments
    # Numbers shape an architecture; a path or a name in a file isn't passed on to the user's code.
    numbers = {name: value for name, value in arguments.items() if isinstance(value, int | float | type(None))}
    static, source = models.create(factory, "none", numbers)
    model = checkpoint.load(directory, static)
    if saved is not None:
        source = replace(source, weights=saved.weights, input_size=saved.input_size)
    mark_source(model, source)
    return model


def opened(text: str, weights: str, trust_code: bool, device: str | None = None, factory: str | None = None) -> Opened:
    """A model that dyconvert saved, if `text` is such a directory, or one that `convert` takes; on `--device`."""
    place = parse_device(device)
    directory = checkpoint.local(text)
    if directory.is_dir() or (directory / checkpoint.DESCRIPTION).exists():
        model = restored(directory, trust_code, factory).to(place)
        source = source_of(model)
        size = source.input_size if source else None
        return Opened(model, name_of(Path(text)), source, True, size or _size_in_plan(model))
    model, source = models.create(text, weights, {})
    return Opened(model.to(place), source.specifier.rpartition(":")[2], source, False, source.input_size)


def original_of(main: Opened, device: str | None = None) -> Opened | None:
    """The static model that a saved one was made from, with its weights, or None if they can't be had."""
    if main.source is None or not main.saved:
        return None
    source = main.source
    try:
        if source.weights is None and not source.runs_user_code:
            raise ModelError("Its weights were random, and they weren't kept.")
        model, _ = models.create(source.specifier, source.weights or "default", source.arguments)
    except ModelError as error:
        warn(f"without the original: {error} Name it with --against.")
        return None
    return Opened(model.to(parse_device(device)), source.specifier.rpartition(":")[2], source, False, source.input_size)


def example_of(
    model: nn.Module, source: models.Source | None, size: tuple[int, ...] | None, batch: int
) -> tuple[Any, ...]:
    """An input for a model: of `size`, or of its source's, or of its conversion's; that it is a guess is said."""
    known = size or (source.input_size if source is not None else None) or _size_in_plan(model)
    example = example_for(model, batch=batch, size=known)
    if known is None:
        shape = "x".join(map(str, getattr(example[0], "shape", ())[1:]))
        warn(f"The model doesn't say what its input is: {shape} is assumed. Say it with --input-size.")
    return example


def _size_in_plan(model: nn.Module) -> tuple[int, ...] | None:
    """The shape of the model's input when it was converted: that of the map that its stem reads."""
    plan = plan_of(model)
    stems = [conv for conv in plan.convs if conv.reason == STEM] if isinstance(plan, Plan) else []
    if not stems or not stems[0].map_size:
        return None
    return (stems[0].in_channels, *stems[0].map_size)


def image_size_for(main: Opened, data: str | None) -> tuple[int, ...] | None:
    """The size to show a model its images at: its own, if that is known, but no image is made larger than it is."""
    source_says = main.source is not None and main.source.input_size is not None
    if source_says or data in (None, "digits") or not Path(data).is_dir():
        return main.size
    of_data = image_size(image_files(Path(data))[0])
    # A factory doesn't tell the size of its model's input, and a conversion without --input-size guesses.
    return of_data if main.size is None or max(of_data) < max(main.size[-2:]) else main.size


def loaded(
    directory: Path,
    trust_code: bool,
    size: tuple[int, ...] | None,
    batch: int = 2,
    device: str | None = None,
    factory: str | None = None,
) -> tuple[nn.Module, models.Source | None, tuple[Any, ...]]:
    """A saved model, where it came from, and an input for it: of `size`, or of its source's."""
    model = restored(directory, trust_code, factory).to(parse_device(device))
    source = source_of(model)
    return model, source, example_of(model, source, size, batch)


def images_for(
    data: str, model: nn.Module, example: tuple[Any, ...], mean: str | None, std: str | None, limit: int | None
) -> ImageSet:
    """The images of `--data` as the model takes them: of the example's size, normalised as asked or as it says.

    Raises:
        ModelError: there are none, or they can't be what the model takes.
    """
    source = source_of(model)
    known = preprocessing_of(model) or (preprocessing_for(source) if source is not None else None)
    known = None if data == "digits" else known
    numbers = (
        parse_numbers(mean) if mean else (known.mean if known else None),
        parse_numbers(std) if std else (known.std if known else None),
    )
    shape = getattr(example[0], "shape", (0,))[1:]
    return read_images(data, shape, *numbers, limit=limit)
