"""dyconvert report"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text
from torch import nn

from dyconvert import checkpoint, models
from dyconvert.analysis.images import image_files, image_size
from dyconvert.cli.options import Mean, Std, images_for, parse_size
from dyconvert.console import err, out
from dyconvert.errors import ModelError
from dyconvert.marks import plan_of, source_of
from dyconvert.nn import DynamicConv
from dyconvert.surgery.blocks import STEM, check_convertible
from dyconvert.surgery.observe import example_for
from dyconvert.surgery.plan import Plan


def report(
    model: Annotated[
        str, typer.Argument(metavar="DIR|MODEL", help="A model saved by dyconvert, or one that `convert` takes.")
    ],
    data: Annotated[
        str | None,
        typer.Option(help="A folder of images, its subfolders the classes, or `digits`. Without it, half the report."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The original, DIR or MODEL; by default the one that DIR was converted from.")
    ] = None,
    narrow: Annotated[
        str | None, typer.Option(help="A static model of the dynamic one's width, DIR or MODEL, to be timed beside it.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write to.")] = Path("report"),
    sweep: Annotated[
        Path | None, typer.Option(help="CSV of a sweep of fine-tuning runs; by default sweep.csv in DIR.")
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Correlate this layer's feature maps; by default the paper's layer. Repeatable."),
    ] = None,
    sizes: Annotated[str, typer.Option(help="Input sizes to time, in pixels; `none`.")] = "96,160,224,288,352,448",
    input_size: Annotated[str | None, typer.Option(help="Of the images, such as 3,224,224 or 224.")] = None,
    mean: Mean = None,
    std: Std = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read this many images, evenly spread, at most.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at a time; by default by their size.")] = None,
    weights: Annotated[str, typer.Option(help="Of MODEL, as `convert` takes them.")] = "default",
    against_weights: Annotated[str, typer.Option(help="Of the original, where it is a MODEL.")] = "default",
    seconds: Annotated[float, typer.Option(min=0, help="Of timing, for each input size.")] = 4.0,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Count CPU time: on a busy machine the fairer clock.")
    ] = False,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the Python file or module that DIR's model was built by.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the report in the output directory.")] = False,
) -> None:
    """See what a conversion and its fine-tuning did: one HTML page, its pictures, its numbers."""
    from dyconvert.analysis.ablation import SWEEP, read_run, read_sweep
    from dyconvert.analysis.study import analyse
    from dyconvert.report.write import check_directory, check_extra, write_report

    check_extra()
    check_directory(output, force)
    wanted = _sizes(sizes)
    size = parse_size(input_size)
    folder = Path(model)
    if sweep is None and (folder / SWEEP).is_file():
        sweep = folder / SWEEP
    ablation = read_sweep(sweep) if sweep is not None else None
    run = read_run(folder) if folder.is_dir() else None
    started = time.perf_counter()
    with _progress() as tell:
        tell(f"loading {model}", 0, None)
        main = opened(model, weights, trust_code)
        if not any(isinstance(module, DynamicConv) for module in main.model.modules()):
            check_convertible(main.model)
        original = opened(against, against_weights, trust_code) if against else original_of(main)
        static = opened(narrow, "default", trust_code) if narrow else None
        example = example_for(main.model, batch=1, size=size or image_size_for(main, data))
        images = images_for(data, main.model, example, mean, std, limit) if data is not None else None
        result = analyse(
            main.model,
            images,
            original=original.model if original else None,
            narrow=static.model if static else None,
            layers=layer or (),
            example=example,
            sizes=wanted,
            batch_size=batch_size,
            seconds=seconds,
            cpu_time=cpu_time,
            run=run,
            ablation=ablation,
            names={key: m.name for key, m in (("model", main), ("original", original), ("narrow", static)) if m},
            progress=tell,
        )
        page = write_report(result, output, images=images, force=force, progress=tell)
    for finding in result.findings:
        style = "yellow" if finding.level == "warning" else ""
        out.print(Text(("! " if finding.level == "warning" else "- ") + finding.text, style=style))
    for what, why in result.left_out.items():
        out.print(Text(f"left out: {what}: {why}"), style="dim")
    seen = f"{result.images} images, " if result.images else ""
    out.print(f"wrote {page}: {seen}{time.perf_counter() - started:.0f} s", markup=False, soft_wrap=True)


@dataclass
class Opened:
    """A model, what to call it, where it came from, and the size of its input if that is known."""

    model: nn.Module
    name: str
    source: "models.Source | None"
    saved: bool
    size: tuple[int, ...] | None


def opened(text: str, weights: str, trust_code: bool) -> Opened:
    """A model that dyconvert saved, if `text` is such a directory, or one that `convert` takes."""
    directory = Path(text)
    if directory.is_dir() or (directory / checkpoint.DESCRIPTION).exists():
        model = checkpoint.load(directory, trust_code=trust_code)
        source = source_of(model)
        size = source.input_size if source else None
        return Opened(model, directory.resolve().name, source, True, size or _size_in_plan(model))
    model, source = models.create(text, weights, {})
    return Opened(model, source.specifier.rpartition(":")[2], source, False, source.input_size)


def original_of(main: Opened) -> Opened | None:
    """The static model that a saved one was made from, with its weights, or None if they can't be had."""
    if main.source is None or not main.saved:
        return None
    source = main.source
    try:
        model, _ = models.create(source.specifier, source.weights or "default", source.arguments)
    except ModelError as error:
        err.print(Text(f"without the original: {error} Name it with --against.", style="yellow"))
        return None
    return Opened(model, source.specifier.rpartition(":")[2], source, False, source.input_size)


def _size_in_plan(model: nn.Module) -> tuple[int, ...] | None:
    """What the model's input was when it was converted: the map that its stem reads."""
    plan = plan_of(model)
    stems = [conv for conv in plan.convs if conv.reason == STEM] if isinstance(plan, Plan) else []
    if not stems or not stems[0].map_size:
        return None
    return (stems[0].in_channels, *stems[0].map_size)


def image_size_for(main: Opened, data: str | None) -> tuple[int, ...] | None:
    """The size to show a model its images at: its own, if that is known, but no image is made larger than it is."""
    source_says = main.source is not None and main.source.input_size is not None
    if source_says or data is None or not Path(data).is_dir():
        return main.size
    of_data = image_size(image_files(Path(data))[0])
    # A factory doesn't say what it takes, and a conversion without --input-size guesses.
    return of_data if main.size is None or max(of_data) < max(main.size[-2:]) else main.size


def _sizes(text: str) -> tuple[int, ...]:
    if text == "none":
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ModelError(f"--sizes {text!r} is no list of sizes. Write 96,224,448, or none.")
    return tuple(int(part) for part in parts)


@contextmanager
def _progress() -> Iterator[Any]:
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
