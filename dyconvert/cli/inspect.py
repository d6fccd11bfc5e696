"""dyconvert inspect"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from dyconvert.cli.options import IMAGES, Factory, Json, Mean, Size, Std, Trust, parse_size
from dyconvert.cli.progress import progress
from dyconvert.console import count, out, write_json

if TYPE_CHECKING:
    from dyconvert.nn import DynamicConv


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A model saved by dyconvert.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder of images, or `digits`: how far coefficients vary over them.", rich_help_panel=IMAGES
        ),
    ] = None,
    input_size: Size = None,
    mean: Mean = None,
    std: Std = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Read at most this many, at even intervals.", rich_help_panel=IMAGES)
    ] = 500,
    as_json: Json = False,
    trust_code: Trust = False,
    factory: Factory = None,
    device: str | None = None,
) -> None:
    """Print the essentials of a saved model: its blocks, its experts, and whether its predictors have learnt."""
    size = parse_size(input_size)

    from dyconvert import checkpoint, models
    from dyconvert.analysis.cost import cost
    from dyconvert.analysis.flops import tensor_bytes
    from dyconvert.analysis.passing import check_finite, pass_over
    from dyconvert.cli.opening import example_of, image_size_for, images_for, opened
    from dyconvert.marks import plan_of
    from dyconvert.nn import DynamicConv
    from dyconvert.surgery.convert import plan as plan_model

    with progress(f"reading {directory}"):
        place = checkpoint.local(directory)
        description = checkpoint.describe(place)
        saved = opened(str(place), "default", trust_code, device, factory)
        model = saved.model
        check_finite(model, str(directory))
        example = example_of(model, None, size or image_size_for(saved, data), 1)
        # A static model, saved as a control, shows the plan of its conversion.
        plan = plan_of(model) or plan_model(model, example=example)
        static = models.build(saved.source) if saved.source is not None else None
        costs = cost(model, plan, example, static, seconds=0)
        coefficients = None
        if data is not None:
            images = images_for(data, model, example, mean, std, limit)
            coefficients = pass_over(model, images.batches(50), classes=images.classes, count=len(images)).coefficients
        rows = [_conv(model, name, conv) for name, conv in model.named_modules() if isinstance(conv, DynamicConv)]
    varying = {conv.name: conv for conv in coefficients.convs} if coefficients is not None else {}
    for row in rows:
        if row["conv"] in varying:
            row["spread"] = varying[row["conv"]].varies
            row["unused"] = [i + 1 for i in varying[row["conv"]].unused]
    if as_json:
        result = {
            "source": description.source,
            "dyconvert": description.dyconvert,
            "method": plan.method.model_dump(),
            "convs": rows,
            "cost": costs.model_dump(mode="json"),
            "compression": description.compression and description.compression.model_dump(),
            "bytes": tensor_bytes(model),
            "skipped": plan.reasons(),
        }
        write_json(result)
        return
    source = saved.source
    where = f"{source.specifier}, weights: {source.weights or 'of the factory, or random'}" if source else "no source"
    out.print(Text(f"{directory}", style="bold"), f"({plan.model}, saved by dyconvert {description.dyconvert})")
    out.print(Text(where))
    temperatures = sorted({row["temperature"] for row in rows})
    shown = " to ".join(f"{t:g}" for t in dict.fromkeys((temperatures or [1.0])[:: max(len(temperatures) - 1, 1)]))
    if rows:
        out.print(f"method {plan.method.name}, g = {plan.method.g}, {plan.method.activation}, temperature {shown}")
        out.print(Text(plan.summary()))
    else:
        out.print(f"static: none of {len(plan.convs)} convs is dynamic")
    out.print(f"tensors: {count(tensor_bytes(model))}B" + (f", {how}" if (how := description.compression) else ""))
    shape = "x".join(map(str, getattr(example[0], "shape", ())[1:]))
    for what in ("parameters", "macs"):
        after, before = getattr(costs.after, what), getattr(costs.before, what) if costs.before else None
        name = {"parameters": "parameters", "macs": f"multiply-adds, one image of {shape}"}[what]
        was = f"{count(before)} became " if before else ""
        if after is not None:
            out.print(f"{name}: {was}{count(after)}")
    out.print(f"  of them predicting {count(costs.predicting)}, mixing {count(costs.mixing)}")
    if not rows:
        return
    out.print()
    out.print(_table(rows, bool(varying)))
    learnt = sum(row["predictor"] == "trained" for row in rows)
    out.print(f"\n{learnt} of {len(rows)} convs have a predictor that was trained.")
    if not varying:
        out.print("With --data FOLDER: how far coefficients vary. `dyconvert report` shows everything.")


def _conv(model: Any, name: str, conv: "DynamicConv") -> dict[str, Any]:
    from dyconvert.analysis.correlation import expert_correlation
    from dyconvert.surgery.watch import predictor_of

    predictor = predictor_of(model, name)
    correlation = expert_correlation(name, conv)
    return {
        "conv": name,
        "g": conv.g,
        "parameters": sum(p.numel() for p in (conv.weight, conv.bias) if p is not None),
        "alike": correlation.between.mean_absolute if correlation else None,
        "temperature": float(predictor.temperature),
        # A conversion starts the last linear at zero, and training moves it.
        "predictor": "trained" if bool(predictor.linear.weight.any()) else "as converted",
    }


def _table(rows: list[dict[str, Any]], varying: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("conv", overflow="fold")
    for column in ("g", "parameters", "experts alike, r", "predictor"):
        table.add_column(column, justify="right")
    if varying:
        table.add_column("varies by", justify="right")
    for row in rows:
        alike = "-" if row["alike"] is None else f"{row['alike']:.2f}"
        cells = [row["conv"] or "(the model)", str(row["g"]), count(row["parameters"]), alike, row["predictor"]]
        if varying:
            unused = f", {len(row['unused'])} unused" if row.get("unused") else ""
            cells.append(f"{row['spread']:.4f}{unused}" if "spread" in row else "-")
        table.add_row(*cells)
    return table
