"""dyconvert recipes"""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from dyconvert.cli import completing
from dyconvert.cli.common import with_common
from dyconvert.cli.options import Json
from dyconvert.console import count, err, out, write, write_json
from dyconvert.errors import RecipeError
from dyconvert.files import write_file
from dyconvert.limits import JOBS, SEED, YAML_BYTES, read_text

app = typer.Typer(help="List, show, copy and check recipes for `dyconvert finetune`.", no_args_is_help=True)

_NAME_OR_FILE = typer.Argument(
    metavar="NAME|FILE",
    help="A shipped recipe's name, or a YAML file.",
    autocompletion=completing.recipes_and_sweeps,
)
_OVERRIDES = typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes, such as train.lr=0.01 or convert=null.")


def ls(as_json: Json = False) -> None:
    """List the recipes and sweeps that come with dyconvert."""
    from dyconvert.finetuning.recipes.shipped import descriptions, shipped_recipes, shipped_sweeps

    recipes, sweeps = descriptions(shipped_recipes()), descriptions(shipped_sweeps())
    if as_json:
        write_json({"recipes": recipes, "sweeps": sweeps})
        return
    for title, found, command in (("recipes", recipes, "finetune"), ("sweeps", sweeps, "recipes sweep")):
        out.print(Text(f"{title}: dyconvert {command} NAME", style="bold"))
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        for name, description in found.items():
            table.add_row(name, description)
        out.print(table)
        out.print()
    out.print("`dyconvert recipes show NAME` prints one; `recipes cp NAME FILE` makes it yours.")


def show(recipe: Annotated[str, _NAME_OR_FILE]) -> None:
    """Print a recipe as it stands in its file, with the reasons for its values."""
    from dyconvert.finetuning.recipes.shipped import find_recipe

    file = find_recipe(recipe)
    try:
        text = read_text(file, YAML_BYTES)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file} can't be read: {error}. Give another file.") from None
    if out.is_terminal:
        from rich.syntax import Syntax

        out.print(Syntax(text, "yaml", background_color="default", word_wrap=True))
    else:
        write(text)


def cp(
    recipe: Annotated[str, _NAME_OR_FILE],
    file: Annotated[Path, typer.Argument(help="Where to; a directory takes it under its own name.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Copy a recipe, with the model's Python file if it has one, to change it."""
    from dyconvert.finetuning import load_recipe
    from dyconvert.finetuning.recipes.shipped import find_recipe
    from dyconvert.finetuning.sweeps.schema import is_sweep

    source = find_recipe(recipe)
    target = file / source.name if file.is_dir() else file
    if target.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"{target} should end with .yaml, so that it is taken for a file and not for a name.")
    if os.path.lexists(target) and not force:
        raise RecipeError(f"{target} exists already. Replace it with --force, or choose another name.")
    if not target.parent.is_dir():
        raise RecipeError(f"The directory {target.parent} doesn't exist. Make it first.")
    pairs = [(source, target)]
    if not is_sweep(source):
        location = load_recipe(source).model.specifier.rpartition(":")[0]
        beside = Path(location)
        if beside.suffix == ".py" and beside.parent == source.resolve().parent:
            pairs.append((beside, target.parent / beside.name))
    for original, copy in pairs:
        if copy != target and os.path.lexists(copy):
            out.print(f"kept {copy}")
            continue
        write_file(copy, original.read_bytes(), RecipeError)
        out.print(f"wrote {copy}", soft_wrap=True)
    command = "recipes sweep" if is_sweep(source) else "finetune"
    out.print(f"\nNext: dyconvert {command} {target}", soft_wrap=True)


def validate(
    files: Annotated[
        list[str],
        typer.Argument(metavar="NAME|FILE...", help="Recipes or sweeps.", autocompletion=completing.recipes_and_sweeps),
    ],
    as_json: Json = False,
) -> None:
    """Check recipes: all errors of all of them, each with its path, its line and the nearest valid name."""
    from dyconvert.finetuning import load_recipe
    from dyconvert.finetuning.recipes.shipped import find_recipe
    from dyconvert.finetuning.sweeps.schema import is_sweep, load_sweep

    problems, fine = [], []
    for file in files:
        try:
            if is_sweep(find_recipe(file)):
                load_sweep(file).recipes()
            else:
                load_recipe(file)
        except RecipeError as error:
            problems.append(str(error))
        else:
            fine.append(file)
            if not as_json:
                out.print(f"{file}: ok", soft_wrap=True)
    if as_json:
        write_json({"valid": fine, "problems": problems})
    if problems:
        raise RecipeError("\n".join(problems))


def schema() -> None:
    """Print the JSON Schema of recipes, with which editors complete and check them.

    `dyconvert recipes schema > recipe.schema.json`, and `# yaml-language-server: $schema=recipe.schema.json` as the
    recipe's first line.
    """
    from dyconvert.finetuning.recipes.recipe import json_schema

    write_json(json_schema())


def sweep(
    file: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE", help="A shipped sweep's name, or a YAML file.", autocompletion=completing.sweeps
        ),
    ],
    overrides: Annotated[list[str] | None, _OVERRIDES] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only runs whose names match. Repeatable.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 0,1,2; by default the sweep's own.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time; above one, each with one thread.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the runs; by default runs/NAME.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every run, and list them.")] = False,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the Python file or module that the recipe names.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the same recipe with changes and seeds, and print one table.

    Each run's row is saved to sweep.csv as it ends; the same command goes on after a stop.
    """
    from dyconvert.finetuning.sweeps.schema import load_sweep

    chosen = _seeds(seeds)

    loaded = load_sweep(file, overrides or [])

    from dyconvert.finetuning.sweeps.runner import Runner
    from dyconvert.finetuning.sweeps.table import markdown, table_rows

    runner = Runner(loaded, output or Path("runs") / loaded.name, only=only or (), seeds=chosen)
    if dry_run:
        jobs = [{"run": job.run, "seed": job.seed, "done": runner.is_done(job)} for job in runner.jobs]
        if as_json:
            write_json(jobs)
            return
        for job in runner.jobs:
            out.print(f"{job.run} seed {job.seed}: {'done' if runner.is_done(job) else 'to do'}")
        return

    def report(line: str) -> None:
        err.print(Text(line))

    failed = runner.run(workers=workers, report=report, trust_code=trust_code)
    rows = runner.rows()
    if as_json:
        write_json(rows)
    else:
        header, *lines = table_rows(rows, count)
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for index, name in enumerate(header):
            # On a narrow terminal the runs' names are broken, and never the numbers.
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index > 0)
        for line in lines:
            table.add_row(*line)
        out.print(table)
        write_file(runner.markdown, markdown(rows, count), RecipeError)
        out.print(f"\nsaved to {runner.csv} and {runner.markdown}", soft_wrap=True)
    if failed:
        listed = "; ".join(each.rstrip(".") for each in failed)
        raise RecipeError(
            f"{len(failed)} of {len(runner.jobs)} runs failed: {listed}. The same command tries them again."
        )


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        seeds = [int(part) for part in text.split(",")]
        if len(seeds) > JOBS or any(abs(seed) > SEED for seed in seeds):
            raise ValueError
        return seeds
    except ValueError:
        raise RecipeError(f"--seeds {text!r} is no list of whole numbers. Write 0,1,2.") from None


for _function in (ls, show, cp, validate, schema):
    app.command(_function.__name__)(with_common(_function))
app.command("sweep")(with_common(sweep, silent=True))
