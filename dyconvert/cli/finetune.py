"""dyconvert finetune"""

import contextlib
import importlib
from typing import Annotated

import typer

from dyconvert.cli import completing
from dyconvert.cli.options import Json
from dyconvert.cli.progress import progress
from dyconvert.console import err, out, write_json
from dyconvert.errors import RecipeError


def finetune(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE",
            help="A shipped recipe's name, or a YAML file.",
            autocompletion=completing.recipes,
        ),
    ],
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
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the Python file or module that the recipe names.")
    ] = False,
    push_to: Annotated[
        str | None,
        typer.Option(
            metavar="USER/NAME", help="Put the best model onto the Hugging Face Hub at the end, as `push` does."
        ),
    ] = None,
    as_json: Json = False,
    device: str | None = None,
) -> None:
    """Convert a pretrained model and fine-tune it, as a recipe says.

    `dyconvert recipes ls` lists the recipes. Ctrl-C saves, and says how to continue.
    """
    from dyconvert.checkpoint.hub import check_repo
    from dyconvert.finetuning import finetune as run
    from dyconvert.finetuning import load_recipe

    loaded = load_recipe(recipe, [*(overrides or []), *_on(device)])
    if push_to is not None:
        check_repo(push_to)
    if dry_run:
        from dyconvert.finetuning.dry_run import preview

        shown = preview(loaded, report=err.print, trust_code=trust_code)
        if as_json:
            write_json(shown.to_json())
        else:
            out.print(shown)
            out.print("\nDry run: nothing was written.")
        return
    with progress("importing torch and Lightning"), contextlib.suppress(ImportError):  # run() says what is missing
        importlib.import_module("dyconvert.finetuning.run")
    summary = run(loaded, resume=resume, progress=not err.quiet, trust_code=trust_code)
    from dyconvert.finetuning.run import push_run
    from dyconvert.finetuning.training.trainers import is_main_process

    if not is_main_process():  # of several; all have the same summary
        return
    if as_json:
        write_json(summary.to_json())
    else:
        out.print(summary)
    if push_to is not None:
        # After the figures, which a failure here is not to keep back.
        address = push_run(loaded, push_to)
        if not as_json:
            out.print(f"pushed to {address}", soft_wrap=True)


def _on(device: str | None) -> list[str]:
    """The recipe's change that `--device` stands for."""
    if device is None:
        return []
    kinds = {"cpu": "cpu", "cuda": "gpu", "mps": "mps"}
    if device not in kinds:
        raise RecipeError(
            f"--device {device}: fine-tuning takes cpu, cuda or mps. CUDA_VISIBLE_DEVICES=1 dyconvert finetune ... "
            "chooses a GPU, and train.devices=N how many."
        )
    return [f"train.accelerator={kinds[device]}"]
