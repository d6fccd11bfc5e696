"""dyconvert report"""

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from dyconvert.cli import completing
from dyconvert.cli.options import Factory, Mean, Size, Std, Trust, parse_size, whole_numbers
from dyconvert.cli.progress import progress
from dyconvert.console import out, write_json
from dyconvert.errors import ModelError, said_as
from dyconvert.limits import INPUT_SIDE
from dyconvert.run_files import SWEEP


def report(
    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR|MODEL",
            help="A model saved by dyconvert, or one that `convert` takes.",
            autocompletion=completing.models,
        ),
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
    sizes: Annotated[
        str, typer.Option(help="Input sizes to time, such as 96,224,448; `none`; `auto`: half of to twice the model's.")
    ] = "auto",
    input_size: Size = None,
    mean: Mean = None,
    std: Std = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read at most this many images, at even intervals.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at a time; by default by their size.")] = None,
    weights: Annotated[str, typer.Option(help="Of MODEL, as `convert` takes them.")] = "default",
    against_weights: Annotated[str, typer.Option(help="Of the original, where it is a MODEL.")] = "default",
    seconds: Annotated[float, typer.Option(min=0, help="Of timing, for each input size.")] = 4.0,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Count CPU time: on a busy machine the fairer clock.")
    ] = False,
    trust_code: Trust = False,
    factory: Factory = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report's numbers as JSON.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the report in the output directory.")] = False,
    device: str | None = None,
) -> None:
    """See what a conversion and its fine-tuning did: one HTML page, its pictures, its numbers."""
    sizes_asked = _sizes(sizes)
    size = parse_size(input_size)

    from dyconvert.analysis.ablation import read_run, read_sweep
    from dyconvert.analysis.study import analyse
    from dyconvert.cli.opening import example_of, image_size_for, images_for, opened, original_of
    from dyconvert.nn import DynamicConv
    from dyconvert.report.write import check_directory, check_extra, write_report
    from dyconvert.surgery.blocks import check_convertible

    check_extra()
    check_directory(output, force)
    folder = Path(model)
    if sweep is None and (folder / SWEEP).is_file():
        sweep = folder / SWEEP
    ablation = read_sweep(sweep) if sweep is not None else None
    run = read_run(folder) if folder.is_dir() else None
    started = time.perf_counter()
    with progress(f"loading {model}") as tell:
        main = opened(model, weights, trust_code, device, factory)
        if not any(isinstance(module, DynamicConv) for module in main.model.modules()):
            check_convertible(main.model)
        with said_as({"weights": "--against-weights", "model": None}):
            original = opened(against, against_weights, trust_code, device) if against else original_of(main, device)
        with said_as({"model": None}):
            # It is timed, for which any weights will do.
            static = opened(narrow, "none", trust_code, device) if narrow else None
        example = example_of(main.model, None, size or image_size_for(main, data), 1)
        images = images_for(data, main.model, example, mean, std, limit) if data is not None else None
        result = analyse(
            main.model,
            images,
            original=original.model if original else None,
            narrow=static.model if static else None,
            layers=layer or (),
            example=example,
            sizes=sizes_asked,
            batch_size=batch_size,
            seconds=seconds,
            cpu_time=cpu_time,
            run=run,
            ablation=ablation,
            names={key: m.name for key, m in (("model", main), ("original", original), ("narrow", static)) if m},
            progress=tell,
        )
        page = write_report(result, output, images=images, force=force, progress=tell)
    if as_json:
        write_json({"page": str(page), **json.loads((page.parent / "report.json").read_text(encoding="utf-8"))})
        return
    for finding in result.findings:
        style = "yellow" if finding.level == "warning" else ""
        out.print(Text(("! " if finding.level == "warning" else "- ") + finding.text, style=style))
    for what, why in result.left_out.items():
        out.print(Text(f"left out: {what}: {why}"), style="dim")
    seen = f"{result.images} images, " if result.images else ""
    out.print(f"wrote {page}: {seen}{time.perf_counter() - started:.0f} s", soft_wrap=True)


def _sizes(text: str) -> tuple[int, ...] | None:
    if text == "auto":
        return None
    if text == "none":
        return ()
    sizes = whole_numbers(text)
    if not sizes or min(sizes) < 1 or max(sizes) > INPUT_SIDE:
        raise ModelError(f"--sizes {text!r} is no list of sizes up to {INPUT_SIDE:,}. Write 96,224,448, auto or none.")
    return tuple(sizes)
