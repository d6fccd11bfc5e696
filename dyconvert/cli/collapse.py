"""dyconvert collapse"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dyconvert.cli.options import IMAGES, Factory, Json, Mean, Size, Std, Trust, check_free, parse_size
from dyconvert.cli.progress import progress
from dyconvert.console import count, out, warn, write_json
from dyconvert.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dyconvert.analysis.images import ImageSet


def collapse(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A model saved by dyconvert.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.safetensors or FILE.pth.")],
    coefficients: Annotated[
        str | None, typer.Option(help="initial: those of untrained predictors; the default without --data.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder of images, with or without subfolders, or `digits`: their mean coefficients.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    input_size: Size = None,
    mean: Mean = None,
    std: Std = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Read at most this many, at even intervals.", rich_help_panel=IMAGES)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.", rich_help_panel=IMAGES)] = 32,
    trust_code: Trust = False,
    factory: Factory = None,
    as_json: Json = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file.")] = False,
    device: str | None = None,
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

    from dyconvert.analysis.flops import parameters
    from dyconvert.cli.opening import images_for, loaded
    from dyconvert.differences import verify
    from dyconvert.exporting.exported import written
    from dyconvert.surgery.collapse import collapse as collapse_model

    with progress(f"collapsing {directory}") as tell:
        model, source, example = loaded(directory, trust_code, size, device=device, factory=factory)
        batches: Iterator[Tensor] | str = "initial"
        seen = [0]
        if data is not None:
            images = images_for(data, model, example, mean, std, limit)
            batches = _counted(images, batch_size, seen)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            static = collapse_model(model, batches)
        tell(f"writing {output}", 0, None)
        with written(output) as part:
            _save(static, part)
        difference = verify(model, static, example)
    for warning in dict.fromkeys(str(each.message) for each in caught if issubclass(each.category, UserWarning)):
        warn(warning)
    if as_json:
        write_json(
            {
                "file": str(output),
                "bytes": output.stat().st_size,
                "images": seen[0],
                "parameters": [parameters(model), parameters(static)],
                "difference": {"relative": difference.relative, "absolute": difference.absolute},
            }
        )
        return
    over = f"the mean coefficients of {seen[0]} images" if data else "the initial coefficients"
    out.print(f"collapsed at {over}: {count(parameters(model))} parameters became {count(parameters(static))}")
    out.print(f"on random images the static model differs by {difference.relative:.1e} relative")
    out.print(f"wrote {output}: {count(output.stat().st_size)}B", soft_wrap=True)
    if source is not None:
        out.print(f"\nNext: dyconvert convert {source.specifier} --weights {output}", soft_wrap=True)


def _save(model: "nn.Module", file: Path) -> None:
    if file.suffix == ".pth":
        import torch

        torch.save(model.state_dict(), file)
    else:
        from safetensors.torch import save_model

        save_model(model, str(file))


def _counted(images: "ImageSet", size: int, count: list[int]) -> "Iterator[Tensor]":
    for batch, _ in images.batches(size):
        count[0] += len(batch)
        yield batch
