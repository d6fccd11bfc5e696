"""Options of several commands."""

import os
from pathlib import Path
from typing import Annotated

import typer

from dyconvert import files
from dyconvert.errors import ModelError
from dyconvert.limits import DIGITS, INPUT_SIDE, NORMAL

# The help of `--method`. The names stand in `methods.py`, which costs too much to import for a help text.
METHOD = "A method's name: `dyconvert methods` lists them."
# The help panel of options for the images that a command reads.
IMAGES = "Images"
Mean = Annotated[
    str | None,
    typer.Option(
        help="Of their normalisation, by channel; by default the model's own, or ImageNet's.", rich_help_panel=IMAGES
    ),
]
Std = Annotated[str | None, typer.Option(help="Likewise.", rich_help_panel=IMAGES)]
Size = Annotated[str | None, typer.Option("--input-size", help="Such as 3,224,224 or 224.", rich_help_panel=IMAGES)]
Trust = Annotated[bool, typer.Option("--trust-code", help="Run the Python file or module that the model was built by.")]
Factory = Annotated[
    str | None,
    typer.Option("--model", metavar="FILE.py:FACTORY", help="Builds the static model; where its code has moved."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


# A panel of its own would hold one option.
Compress = Annotated[
    str | None,
    typer.Option(metavar="DTYPE", help="Keep the experts in fewer bits, for inference: int8 or bfloat16."),
]


def check_compress(dtype: str | None, static: bool = False) -> None:
    """Refuse what `--compress` doesn't know.

    Raises:
        ModelError: see above.
    """
    if dtype not in (None, "int8", "bfloat16"):
        raise ModelError(f"--compress takes int8 or bfloat16, not {dtype!r}.")
    if dtype is not None and static:
        raise ModelError("--compress is for the experts of dynamic convs, and with --static there are none.")


def parse_size(text: str | None) -> tuple[int, ...] | None:
    """`--input-size`: "3,224,224" or "224" (twice), with x for a comma if need be."""
    if text is None:
        return None
    size = tuple(whole_numbers(text.replace("x", ",")))
    if not size or len(size) > 4 or min(size) < 1 or max(size) > INPUT_SIDE:
        raise ModelError(
            f"--input-size {text!r} is no size. Write 3,224,224 (channels, height, width), or 224; at most "
            f"{INPUT_SIDE:,} a side."
        )
    return size * 2 if len(size) == 1 else size


def whole_numbers(text: str) -> list[int]:
    """Whole numbers with commas; an empty list where the text is something else. None is negative."""
    parts = [part.strip() for part in text.split(",")]
    # Python takes other scripts' digits for digits as well, and refuses thousands of them.
    fine = all(part.isascii() and part.isdigit() and len(part) <= DIGITS for part in parts)
    return [int(part) for part in parts] if fine else []


def parse_numbers(text: str) -> list[float]:
    """`--mean`, `--std`: numbers with commas."""
    try:
        numbers = [float(part) for part in text.split(",")]
        if not all(abs(number) <= NORMAL for number in numbers):  # nor is NaN
            raise ValueError
        return numbers
    except ValueError:
        raise ModelError(f"{text!r} is no list of numbers such as 0.485,0.456,0.406.") from None


def name_of(directory: Path) -> str:
    """The real name of a directory, also if it is given as "." or through links."""
    return os.path.basename(os.path.realpath(directory))


def check_free(file: Path, force: bool) -> None:
    """Refuse a file that exists, before the work is done.

    Raises:
        ModelError: it exists, and isn't to be replaced.
    """
    files.check_free(file, force, ModelError)
