"""dyconvert predict"""

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.table import Table
from rich.text import Text

from dyconvert.cli.options import IMAGES, Factory, Json, Mean, Size, Std, Trust, parse_numbers, parse_size
from dyconvert.cli.progress import progress
from dyconvert.console import out, write_json
from dyconvert.errors import ModelError


def predict(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A model saved by dyconvert.")],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files, and folders of them.", show_default=False)
    ],
    top: Annotated[int, typer.Option(min=1, help="Print the so many likeliest classes.")] = 5,
    input_size: Size = None,
    mean: Mean = None,
    std: Std = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.", rich_help_panel=IMAGES)] = 32,
    trust_code: Trust = False,
    factory: Factory = None,
    as_json: Json = False,
    device: str | None = None,
) -> None:
    """Classify images: the likeliest classes of each, and their probabilities.

    Images are prepared as the model was trained, and classes are named, where the saved model says how: fine-tuned ones
    do, and those made from a library's weights.
    """
    size = parse_size(input_size)

    from dyconvert.analysis.images import image_files
    from dyconvert.analysis.predicting import classified
    from dyconvert.cli.common import parse_device
    from dyconvert.cli.opening import restored

    files = [file for each in images for file in (image_files(each) if each.is_dir() else [each])]
    with progress(f"loading {directory}") as tell:
        model = restored(directory, trust_code, factory).to(parse_device(device))
        prepared = _preprocessing(model, size, mean, std)
        rows: list[dict[str, Any]] = []
        for start in range(0, len(files), batch_size):
            tell("classifying", start, len(files))
            part = files[start : start + batch_size]
            for file, classes in zip(part, classified(model, prepared, part, top), strict=True):
                rows.append({"image": str(file), "classes": [each._asdict() for each in classes]})
    if as_json:
        write_json({"model": str(directory), "predictions": rows})
        return
    for number, each in enumerate(rows):
        if number:
            out.print()
        out.print(Text(each["image"], style="bold"), soft_wrap=True)
        table = Table.grid(padding=(0, 2, 0, 0))
        for row in each["classes"]:
            table.add_row("", Text(f"{100 * row['probability']:.1f} %", justify="right"), row["name"])
        out.print(table)


def _preprocessing(model: Any, size: tuple[int, ...] | None, mean: str | None, std: str | None) -> Any:
    from dyconvert.models.preprocess import preprocessing
    from dyconvert.transforms import Preprocessing

    try:
        known = preprocessing(model).model_dump()
    except ModelError:
        if size is None:
            raise ModelError(
                f"{type(model).__name__} was saved without saying how its images are prepared. Say it: --input-size "
                "3,224,224, and --mean and --std if they aren't ImageNet's."
            ) from None
        known = {}
    if size is not None:
        sides = size if len(size) == 3 else (known["size"][0] if known else 3, *size)
        known |= {"size": sides, "resize": min(sides[1:]) if sides[1] == sides[2] else sides[1:], "keep": True}
        if not known.get("mean") and sides[0] == 1:
            known |= {"mean": (0.449,), "std": (0.226,)}  # ImageNet's, of grey images
    if mean is not None:
        known["mean"] = parse_numbers(mean)
    if std is not None:
        known["std"] = parse_numbers(std)
    try:
        return Preprocessing.model_validate(known)
    except ValidationError as error:
        reason = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors()).rstrip(".")
        raise ModelError(
            f"Images can't be prepared like that: {reason}. Check --input-size, --mean and --std."
        ) from None
