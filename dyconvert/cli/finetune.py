"""dyconvert finetune"""

import json
from typing import Annotated

import typer

from dyconvert.console import err, out
from dyconvert.finetuning import finetune as run
from dyconvert.finetuning import load_recipe


def finetune(
    recipe: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A shipped recipe's name, or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes, such as train.lr=0.01 or convert=null."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the interrupted run in the output directory.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the schedule; train nothing, write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Convert a pretrained model and fine-tune it, as a recipe says.

    `dyconvert recipes ls` lists the recipes. Ctrl-C saves, and says how to continue.
    """
    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        from dyconvert.finetuning.dry_run import preview

        found = preview(loaded, report=err.print)
        if as_json:
            typer.echo(json.dumps(found.to_json(), indent=2))
        else:
            out.print(found)
            out.print("\nDry run: nothing was written.")
        return
    summary = run(loaded, resume=resume)
    from dyconvert.finetuning.training.trainers import is_main_process

    if not is_main_process():  # of several; all have the same summary
        return
    if as_json:
        typer.echo(json.dumps(summary.to_json(), indent=2))
    else:
        out.print(summary)
