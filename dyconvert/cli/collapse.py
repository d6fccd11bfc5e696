"""dyconvert collapse"""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image, UnidentifiedImageError
from rich.text import Text
from torch import Tensor, nn
from torchvision.transforms import v2

from dyconvert import builtin
from dyconvert.analysis.flops import parameters
from dyconvert.cli.options import check_free, loaded, parse_size
from dyconvert.cli.output import count, err, out
from dyconvert.errors import DyconvertError, ModelError
from dyconvert.exported import written
from dyconvert.surgery.collapse import collapse as collapse_model
from dyconvert.verify import verify

_IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def collapse(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A model saved by dyconvert.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.safetensors or FILE.pth.")],
    coefficients: Annotated[
        str | None, typer.Option(help="initial: those of untrained predictors; the default without --data.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A folder of images, with or without subfolders, or `digits`: their mean coefficients."),
    ] = None,
    input_size: Annotated[str | None, typer.Option(help="Such as 3,224,224 or 224.")] = None,
    mean: Annotated[str, typer.Option(help="Of the images' normalisation, by channel.")] = "0.485,0.456,0.406",
    std: Annotated[str, typer.Option(help="Of the images' normalisation, by channel.")] = "0.229,0.224,0.225",
    limit: Annotated[int | None, typer.Option(min=1, help="Read this many images, evenly spread, at most.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the Python file or module that the model was built by.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file.")] = False,
) -> None:
    """Write a static model's weights, for the original architecture: each conv at one set of coefficients.

    Exact only where the coefficients are constant, as they are before training.
    """
    if output.suffix not in (".safetensors", ".pth"):
        raise ModelError(f"--output {output} is neither .safetensors nor .pth. Give it one of these suffixes.")
    if coefficients not in (None, "initial"):
        raise ModelError(f"--coefficients takes `initial`, not {coefficients!r}. For mean coefficients give --data.")
    if coefficients and data:
        raise ModelError("--coefficients initial and --data exclude each other. Give one of them.")
    check_free(output, force)
    size = parse_size(input_size)
    with err.status(f"collapsing {directory}") as status:
        model, source, example = loaded(directory, trust_code, size)
        batches: Iterator[Tensor] | str = "initial"
        seen = [0]
        if data is not None:
            batches = _counted(_batches(data, example[0], _numbers(mean), _numbers(std), limit, batch_size), seen)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            static = collapse_model(model, batches)
        status.update(f"writing {output}")
        with written(output) as part:
            _save(static, part)
        difference = verify(model, static, example)
    for warning in {str(each.message) for each in caught if issubclass(each.category, UserWarning)}:
        out.print(Text(f"warning: {warning}", style="yellow"))
    over = f"the mean coefficients of {seen[0]} images" if data else "the initial coefficients"
    out.print(f"collapsed at {over}: {count(parameters(model))} parameters became {count(parameters(static))}")
    out.print(f"on random images the static model differs by {difference.relative:.1e} relative")
    out.print(f"wrote {output}: {count(output.stat().st_size)}B", markup=False)
    if source is not None:
        out.print(Text(f"\nNext: dyconvert convert {source.specifier} --weights {output}, or load it as a state dict"))


def _save(model: nn.Module, file: Path) -> None:
    if file.suffix == ".pth":
        torch.save(model.state_dict(), file)
    else:
        from safetensors.torch import save_model

        save_model(model, str(file))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ModelError(f"{text!r} is no list of numbers such as 0.485,0.456,0.406.") from None


def _counted(batches: Iterator[Tensor], seen: list[int]) -> Iterator[Tensor]:
    for batch in batches:
        seen[0] += len(batch)
        yield batch


def _batches(
    data: str, like: Tensor, mean: list[float], std: list[float], limit: int | None, batch_size: int
) -> Iterator[Tensor]:
    """The images in batches `[N, C, H, W]`, resized and cropped to the size of `like`."""
    if data == "digits" and not Path(data).exists():
        yield from builtin.load_digits_test()[0][:limit].split(batch_size)
        return
    channels, *spatial = like.shape[1:]
    if len(spatial) != 2 or channels not in (1, 3):
        raise ModelError(f"--data reads images, and the model takes {list(like.shape[1:])}. Use dyconvert.collapse.")
    if channels == 1 and len(mean) == len(std) == 3:
        mean, std = [sum(mean) / 3], [sum(std) / 3]
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ModelError(f"--mean and --std need a number for each of {channels} channels, and std above zero.")
    transform = v2.Compose(
        [
            v2.Resize(min(spatial), antialias=True) if spatial[0] == spatial[1] else v2.Resize(spatial, antialias=True),
            v2.CenterCrop(spatial),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )
    files = _files(Path(data))
    if limit is not None and limit < len(files):
        files = [files[i * len(files) // limit] for i in range(limit)]
    for start in range(0, len(files), batch_size):
        yield torch.stack([_read(file, transform, channels) for file in files[start : start + batch_size]])


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ModelError(f"--data {folder} is no folder. Give a folder of images, or `digits`.")
    found = sorted(
        Path(parent) / name
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in _IMAGES
    )
    if not found:
        raise ModelError(f"--data {folder} holds no images ({', '.join(sorted(_IMAGES))}), nor do its subfolders.")
    return found


def _read(file: Path, transform: v2.Transform, channels: int) -> Tensor:
    try:
        with Image.open(file) as image:
            return transform(image.convert("RGB" if channels == 3 else "L"))
    except (OSError, UnidentifiedImageError) as error:
        raise DyconvertError(f"{file} can't be read as an image: {error}. Remove it, or repair it.") from error
