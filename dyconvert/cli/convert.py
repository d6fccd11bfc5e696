"""dyconvert convert"""

from pathlib import Path
from typing import Annotated

import typer

from dyconvert.cli import completing
from dyconvert.cli.options import METHOD, Compress, Mean, Std, check_compress, parse_size
from dyconvert.errors import ModelError

_MODEL, _METHOD, _CONVS, _NARROW, _OUTPUT = "Model", "Method", "What is converted", "Narrowing", "Output"


def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="resnet50, torchvision:NAME, timm:NAME, package.module:factory or file.py:factory.",
            show_default=False,
            autocompletion=completing.models,
        ),
    ],
    weights: Annotated[
        str,
        typer.Option(
            help="default, none (random), a weight set's name, or a FILE (.pth .pt .th .ckpt .safetensors).",
            rich_help_panel=_MODEL,
        ),
    ] = "default",
    model_arg: Annotated[
        list[str] | None,
        typer.Option("--model-arg", help="An argument for the model: name=value. Repeatable.", rich_help_panel=_MODEL),
    ] = None,
    input_size: Annotated[str | None, typer.Option(help="Such as 3,224,224 or 224.", rich_help_panel=_MODEL)] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            help=METHOD,
            rich_help_panel=_METHOD,
            autocompletion=completing.methods,
        ),
    ] = "dynet",
    g: Annotated[
        int | None,
        typer.Option(
            "--g", help="Experts (weight sets) per conv; by default the method's own.", rich_help_panel=_METHOD
        ),
    ] = None,
    scope: Annotated[
        str | None, typer.Option(help="What one predictor serves: block or layer.", rich_help_panel=_METHOD)
    ] = None,
    reduction: Annotated[
        int | None,
        typer.Option(
            help="Hidden units of the predictor: C_in / reduction; 0 for a single linear.", rich_help_panel=_METHOD
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the predictor's logits.", rich_help_panel=_METHOD)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the experts' initial differences.", rich_help_panel=_METHOD)] = 0,
    include: Annotated[
        list[str] | None,
        typer.Option(
            help="Convert only convs whose names match, such as 'layer4.*'. Repeatable.", rich_help_panel=_CONVS
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Leave convs static whose names match. Repeatable.", rich_help_panel=_CONVS),
    ] = None,
    include_stem: Annotated[
        bool, typer.Option("--include-stem", help="Convert the stem as well.", rich_help_panel=_CONVS)
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Refuse a model with a block whose convs can't share a predictor.",
            rich_help_panel=_CONVS,
        ),
    ] = False,
    width: Annotated[
        float | None,
        typer.Option(help="Narrow the model: the share of its channels to keep, such as 0.5.", rich_help_panel=_NARROW),
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option(help="Narrow the model: the share of its multiply-adds to stay below.", rich_help_panel=_NARROW),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A folder of calibration images, with or without subfolders.", rich_help_panel=_NARROW),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="Narrow weights: least-squares (the default with --data), merge (without), or l1.",
            rich_help_panel=_NARROW,
        ),
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Narrow only: no dynamic convs. The control.", rich_help_panel=_NARROW)
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Don't narrow modules whose names match, such as 'layer4.*'. Repeatable.", rich_help_panel=_NARROW
        ),
    ] = None,
    round_to: Annotated[
        int, typer.Option(help="Narrow channel counts are multiples of this.", rich_help_panel=_NARROW)
    ] = 8,
    calibration_images: Annotated[
        int, typer.Option(help="How many images of --data to use, at even intervals.", rich_help_panel=_NARROW)
    ] = 1000,
    mean: Mean = None,
    std: Std = None,
    compress: Compress = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Directory to save to; by default MODEL-METHOD-gG.", rich_help_panel=_OUTPUT
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan, load no weights, write nothing.", rich_help_panel=_OUTPUT),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=_OUTPUT)] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what is in the output directory.", rich_help_panel=_OUTPUT)
    ] = False,
    device: str | None = None,
) -> None:
    """Convert a pretrained model, check that it computes what it did, and save it.

    With `--width` or `--flops` it becomes narrower as well, and computes something near.
    `dyconvert MODEL ...` does the same.
    """
    from dyconvert.methods import get_method
    from dyconvert.models import check, parse_arguments
    from dyconvert.models.source import is_weights_name

    size = parse_size(input_size)
    if is_weights_name(model):
        raise ModelError(
            f"{model} holds weights, and the model that they belong to is built by code. Type dyconvert MODEL "
            f"--weights {model}, where MODEL is resnet50, timm:NAME or path/to/file.py:FACTORY."
        )
    if (Path(model) / "dyconvert.json").is_file():
        raise ModelError(
            f"{model} is a model that dyconvert saved, converted already. See it with dyconvert inspect {model}, or "
            "name the static model to convert it otherwise."
        )
    check(model, weights)
    arguments = parse_arguments(model_arg or [])
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
    get_method(method, g=g, scope=scope, reduction=reduction, temperature=temperature)

    from dyconvert.cli.converting import Request, convert_and_save, show_plan
    from dyconvert.cli.narrowing import Options

    narrowing = Options(width, flops, data, init, static, tuple(keep or ()), round_to, calibration_images, mean, std)
    narrowing.check()
    check_compress(compress, static)
    request = Request(model, weights, arguments, size, device)
    if dry_run:
        narrowing.refuse_dry_run()
        show_plan(request, chosen, as_json)
    else:
        convert_and_save(
            request, chosen, narrowing, seed=seed, compress=compress, output=output, force=force, as_json=as_json
        )
