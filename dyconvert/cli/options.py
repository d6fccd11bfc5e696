"""What several commands take."""

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from dyconvert import checkpoint, models
from dyconvert.analysis.images import IMAGENET, ImageSet, read_images
from dyconvert.errors import ModelError
from dyconvert.marks import source_of
from dyconvert.surgery.observe import example_for

# Of images that a command reads.
Mean = Annotated[
    str | None, typer.Option(help="Of the images' normalisation, by channel; by default timm's, or ImageNet's.")
]
Std = Annotated[str | None, typer.Option(help="Likewise.")]


def parse_size(text: str | None) -> tuple[int, ...] | None:
    """`--input-size`: "3,224,224" or "224" (twice), with x for a comma if need be."""
    if text is None:
        return None
    try:
        size = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        size = ()
    if not size or min(size) < 1:
        raise ModelError(f"--input-size {text!r} is no size. Write 3,224,224 (channels, height, width), or 224.")
    return size * 2 if len(size) == 1 else size


def parse_numbers(text: str) -> list[float]:
    """`--mean`, `--std`: numbers with commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ModelError(f"{text!r} is no list of numbers such as 0.485,0.456,0.406.") from None


def images_for(
    data: str, model: nn.Module, example: tuple[Any, ...], mean: str | None, std: str | None, limit: int | None
) -> ImageSet:
    """The images of `--data` as the model takes them: of the example's size, normalised as asked or as it says.

    Raises:
        ModelError: there are none, or they can't be what the model takes.
    """
    # timm's models say how they were trained.
    config = getattr(model, "pretrained_cfg", None)
    config = config if isinstance(config, dict) else {}
    numbers = (
        parse_numbers(mean) if mean else config.get("mean", IMAGENET[0]),
        parse_numbers(std) if std else config.get("std", IMAGENET[1]),
    )
    shape = getattr(example[0], "shape", (0,))[1:]
    return read_images(data, shape, *numbers, limit=limit)


def check_free(file: Path, force: bool) -> None:
    """Refuse a file that exists, before the work is done.

    Raises:
        ModelError: it exists, and isn't to be replaced.
    """
    if file.is_dir():
        raise ModelError(f"{file} is a directory. Name a file with --output.")
    if file.exists() and not force:
        raise ModelError(f"{file} exists already. Replace it with --force, or choose another --output.")


def loaded(
    directory: Path, trust_code: bool, size: tuple[int, ...] | None, batch: int = 2
) -> tuple[nn.Module, models.Source | None, tuple[Any, ...]]:
    """A saved model, where it came from, and an input for it: of `size`, or of its source's."""
    model = checkpoint.load(directory, trust_code=trust_code)
    source = source_of(model)
    return model, source, example_for(model, batch=batch, size=size or (source.input_size if source else None))
