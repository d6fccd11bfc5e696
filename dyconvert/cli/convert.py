"""dyconvert convert"""

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text
from torch import nn

from dyconvert import builtin, checkpoint, models
from dyconvert.analysis.flops import macs, parameters
from dyconvert.arguments import first_image
from dyconvert.cli.narrowing import Options, print_narrowing
from dyconvert.cli.options import Mean, Std, parse_size
from dyconvert.console import count, err, out
from dyconvert.errors import ModelError
from dyconvert.marks import narrowing_of, plan_of
from dyconvert.surgery.blocks import check_convertible
from dyconvert.surgery.convert import convert as convert_model
from dyconvert.surgery.convert import plan as plan_model
from dyconvert.surgery.convert import preview
from dyconvert.surgery.observe import example_for
from dyconvert.surgery.plan import Plan
from dyconvert.verify import Differences, verify

# float32's rounding, through the deepest models, stays well below.
TOLERANCE = 1e-4


def convert(
    model: Annotated[
        str, typer.Argument(help="resnet50, torchvision:NAME, timm:NAME, package.module:factory or file.py:factory.")
    ],
    method: Annotated[str, typer.Option("--method", "-m", help="dynet, condconv or dyconv.")] = "dynet",
    g: Annotated[
        int | None, typer.Option("--g", help="Experts (weight sets) per conv; by default the method's own.")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="What one predictor serves: block or layer.")] = None,
    reduction: Annotated[
        int | None, typer.Option(help="Hidden units of the predictor: C_in / reduction; 0 for a single linear.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Divides the predictor's logits.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Convert only convs whose names match, such as 'layer4.*'. Repeatable.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave convs static whose names match. Repeatable.")] = None,
    include_stem: Annotated[bool, typer.Option("--include-stem", help="Convert the stem as well.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a model with a block whose convs can't share a predictor.")
    ] = False,
    weights: Annotated[
        str, typer.Option(help="default, none (random), a weight set's name, or a FILE (.pth .pt .th .safetensors).")
    ] = "default",
    width: Annotated[
        float | None, typer.Option(help="Narrow the model: the share of its channels to keep, such as 0.5.")
    ] = None,
    flops: Annotated[
        float | None, typer.Option(help="Narrow the model: the share of its multiply-adds to stay below.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Narrowing: a folder of calibration images, with or without subfolders.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="Narrow weights: least-squares (the default with --data), merge (without), or l1."),
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="Narrow only: no dynamic convs. The control.")] = False,
    keep: Annotated[
        list[str] | None, typer.Option(help="Don't narrow modules whose names match, such as 'layer4.*'. Repeatable.")
    ] = None,
    round_to: Annotated[int, typer.Option(help="Narrow channel counts are multiples of this.")] = 8,
    calibration_images: Annotated[int, typer.Option(help="How many images of --data to use, evenly spread.")] = 1000,
    mean: Mean = None,
    std: Std = None,
    model_arg: Annotated[
        list[str] | None, typer.Option("--model-arg", help="An argument for the model: name=value. Repeatable.")
    ] = None,
    input_size: Annotated[str | None, typer.Option(help="Such as 3,224,224 or 224.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to save to; by default MODEL-METHOD-gG.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the experts' initial differences.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, load no weights, write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in the output directory.")] = False,
) -> None:
    """Convert a pretrained model, check that it computes what it did, and save it.

    With `--width` or `--flops` it becomes narrower as well, and computes something near.
    `dyconvert MODEL ...` does the same.
    """
    size = parse_size(input_size)
    narrowing = Options(width, flops, data, init, static, tuple(keep or ()), round_to, calibration_images, mean, std)
    narrowing.check()
    chosen = {
        "method": method,
        "g": g,
        "scope": scope,
        "reduction": reduction,
        "temperature": temperature,
        "include": include or (),
        "exclude": exclude or (),
        "include_stem": include_stem,
        "strict": strict,
    }
    arguments = models.parse_arguments(model_arg or [])
    if dry_run:
        narrowing.refuse_dry_run()
        _dry_run(model, weights, arguments, size, chosen, as_json)
        return
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    started = time.perf_counter()
    with progress:
        task = progress.add_task(f"loading {model}", total=None)
        # What can be refused without the weights is refused before they are loaded.
        wanted = output or Path(_name(model, chosen, narrowing))
        checkpoint.check_writable(wanted, force=force)
        static, source = models.create(model, weights, arguments)
        check_convertible(static)
        example = example_for(static, batch=2, size=size or source.input_size)

        def tell(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        if narrowing.wanted:
            dynamic = narrowing.narrow(static, example, seed, tell, {} if narrowing.static else chosen)
            plan = plan_of(dynamic)
        else:
            plan = plan_model(static, **chosen, example=example)
            dynamic = convert_model(static, plan, seed=seed, progress=lambda _, *at: tell("converting", *at))
        seconds = time.perf_counter() - started
        progress.update(task, description="comparing the outputs", total=None)
        differences = (verify if narrowing.wanted else _checked)(static, dynamic, example)
        figures = _figures(static, dynamic, example)
        if source.specifier == "builtin:digits-resnet8":
            figures["accuracy"] = [builtin.accuracy(static), builtin.accuracy(dynamic)]
        progress.update(task, description=f"saving to {wanted}")
        checkpoint.save(dynamic, wanted, source=source, force=force)
    if as_json:
        result = {
            "model": source.to_json(),
            "plan": plan and plan.model_dump(mode="json"),
            **narrowing.as_json(dynamic),
            "difference": {
                "relative": differences.relative,
                "absolute": differences.absolute,
                "numbers": differences.count,
            },
            "seconds": seconds,
            "output": str(wanted),
            **figures,
        }
        typer.echo(json.dumps(result, indent=2))
    else:
        _report(source, dynamic, plan, differences, figures, seconds, wanted)


def _name(model: str, chosen: dict[str, Any], narrowing: Options) -> str:
    """What the directory to save to is called by default."""
    from dyconvert.methods import get_method

    method = get_method(chosen["method"], g=chosen["g"], scope=chosen["scope"])
    name = model.rpartition(":")[2].replace("/", "-") + narrowing.suffix
    return f"{name}-static" if narrowing.static else f"{name}-{method.name}-g{method.g}"


def _dry_run(
    specifier: str, weights: str, arguments: dict[str, Any], size: Any, chosen: dict[str, Any], as_json: bool
) -> None:
    # The plan doesn't depend on the library's weights, so they aren't downloaded for it.
    static, source = models.create(specifier, "none" if weights == "default" else weights, arguments)
    check_convertible(static)
    example = example_for(static, batch=2, size=size or source.input_size)
    plan = plan_model(static, **chosen, example=example)
    if as_json:
        typer.echo(plan.to_json())
        return
    out.print(plan.table())
    out.print()
    _print_plan(plan)
    _print_figures(_figures(static, preview(static, plan), example))
    out.print("\nDry run: nothing was written.")


def _checked(static: nn.Module, dynamic: nn.Module, example: Any) -> Differences:
    differences = verify(static, dynamic, example)
    if differences.relative > TOLERANCE and verify(static, static, example).relative < differences.relative / 10:
        raise ModelError(
            f"The converted model does not compute what the original did: {differences}. Nothing was saved. "
            "Try --scope layer, or --exclude parts of the model, and please report it."
        )
    return differences


def _figures(static: nn.Module, dynamic: nn.Module, example: tuple[Any, ...]) -> dict[str, list[float]]:
    one = first_image(example)
    return {
        "parameters": [parameters(static), parameters(dynamic)],
        "macs": [macs(static, one), macs(dynamic, one)],
    }


def _report(
    source: "models.Source",
    model: nn.Module,
    plan: Plan | None,
    differences: Differences,
    figures: dict,
    seconds: float,
    saved: Path,
) -> None:
    out.print(Text(source.specifier, style="bold"), f"weights: {source.weights or 'random'}")
    narrowing = narrowing_of(model)
    if narrowing is not None:
        print_narrowing(narrowing)
    if plan is not None:
        _print_plan(plan)
    _print_figures(figures)
    if narrowing is None:
        out.print(
            f"\nlargest difference {differences.relative:.1e} relative (allowed {TOLERANCE:g}), "
            f"{differences.absolute:.1e} absolute, of {differences.count:,} numbers"
        )
    else:
        out.print(f"\nlargest difference {differences.relative:.1e} relative, on random images: it needs fine-tuning")
    out.print(f"loaded and {'converted' if plan else 'narrowed'} in {seconds:.1f} s")
    out.print(f"saved to {saved}")
    # A source that is code of the user's own runs only where they say so.
    trust = ", trust_code=True" if source.runs_user_code else ""
    command = f'python -c "import dyconvert; model = dyconvert.load({str(saved)!r}{trust})"'
    # On one line, however long: it is to be copied.
    out.print(f"\nNext: {command}", soft_wrap=True)


def _print_plan(plan: Plan) -> None:
    out.print(f"method {plan.method.name}, g = {plan.method.g}")
    out.print(Text(plan.summary()))
    for warning in plan.warnings:
        out.print(Text(f"warning: {warning}", style="yellow"))


def _print_figures(figures: dict[str, list[float]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "before", "after", ""):
        table.add_column(name, justify="right" if name else "left")
    titles = {"parameters": "parameters", "macs": "MACs, one image", "accuracy": "accuracy on 360 test digits"}
    for key, title in titles.items():
        if key in figures:
            before, after = figures[key]
            if key == "accuracy":
                table.add_row(title, f"{before:.2f} %", f"{after:.2f} %")
            else:
                ratio = after / before if before else math.nan
                table.add_row(title, count(before), count(after), f"x {ratio:.2f}")
    out.print()
    out.print(table)
