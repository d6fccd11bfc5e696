"""The result of a finished run: summary.json, and a table."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from dyconvert.console import count
from dyconvert.errors import TrainingError
from dyconvert.files import write_file
from dyconvert.limits import FIGURE, JSON_BYTES, parse_json, read_text
from dyconvert.run_files import SUMMARY


@dataclass
class Summary:
    """A finished run.

    Attributes:
        name: the recipe's name.
        directory: the best weights, as `dyconvert.load` reads them; its folders `last` and `ema` have the others.
        metric: "top-1" or "mIoU". All metrics are percentages, of the validation data.
        original: the metric of the pretrained network (with its new head, if it got one).
        converted: the metric of the converted (and narrowed) network before training; None if nothing was converted.
        finetuned: the metric after the last step.
        ema: the metric of the weights' moving average; None without one.
        best: the metric of the best epoch; with a moving average, that of the averaged weights.
        best_epoch: its number, counted from 1.
        parameters, macs: of the original and of the fine-tuned network, for one image. macs is None if the network's
            MACs can't be counted.
        images: numbers of training images and of validation images.
        corrupt: number of images that were left out because they can't be read.
        seconds: time of training and validation; of a resumed run, of all its parts together.
    """

    name: str
    directory: str
    metric: str
    original: float
    converted: float | None
    finetuned: float
    ema: float | None
    best: float
    best_epoch: int
    parameters: tuple[int, int]
    macs: tuple[int, int] | None
    images: tuple[int, int]
    corrupt: int
    epochs: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return a dict that `json` can write."""
        return asdict(self)

    def save(self) -> None:
        """Write summary.json into the directory."""
        write_json(Path(self.directory) / SUMMARY, self.to_json())

    @classmethod
    def read(cls, directory: Path) -> "Summary | None":
        """The summary of a finished run in `directory`, if there is one."""
        try:
            content: dict[str, Any] = parse_json(read_text(directory / SUMMARY, JSON_BYTES))
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
            summary = cls(**values)
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        return summary if summary.is_whole() else None

    def is_whole(self) -> bool:
        """Whether every value has the right type, so that it can be shown: a file may hold anything."""
        numbers = [self.original, self.finetuned, self.best, self.best_epoch, self.corrupt, self.epochs, self.seconds]
        numbers += [value for value in (self.converted, self.ema) if value is not None]
        pairs = [self.parameters, self.images, *([self.macs] if self.macs is not None else [])]
        return (
            all(isinstance(text, str) for text in (self.name, self.directory, self.metric))
            and all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs)
            and all(_is_number(value) for value in [*numbers, *(n for pair in pairs for n in pair)])
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(f"{self.name}")
        for name in (f"{self.metric} %", "", "parameters", "MACs"):
            table.add_column(name, justify="right")
        sizes = [[count(n) for n in self.parameters], [count(n) for n in self.macs or ()] or ["", ""]]
        before, after = ([parameters, macs] for parameters, macs in zip(*sizes, strict=True))
        rows = [
            ("original", self.original, before),
            ("converted", self.converted, after),
            ("fine-tuned", self.finetuned, after),
            ("EMA", self.ema, after),
        ]
        for name, value, columns in rows:
            if value is not None:
                gain = "" if name == "original" else f"{value - self.original:+.2f}"
                table.add_row(name, f"{value:.2f}", gain, *columns)
        yield table
        note = f"\n{self.epochs:g} epochs in {_duration(self.seconds)}; best {self.best:.2f} in epoch {self.best_epoch}"
        if self.corrupt:
            note += f"; {self.corrupt} images left out that can't be read"
        yield Text(note)
        others = "last, ema" if self.ema is not None else "last"
        yield Text(f"saved to {self.directory} (best; below it: {others})")


def write_json(file: Path, content: Any) -> None:
    """Write JSON, in one step.

    Raises:
        TrainingError: it can't be written.
    """
    write_file(file, json.dumps(content, indent=2) + "\n", TrainingError)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= FIGURE


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
