"""A sweep's file: one recipe, the runs that vary it, and their seeds."""

import fnmatch
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from dyconvert.errors import RecipeError, some
from dyconvert.finetuning.recipes.checking import RecipeFile, validated
from dyconvert.finetuning.recipes.recipe import Recipe, load_recipe
from dyconvert.finetuning.recipes.schema import Section, Seed
from dyconvert.finetuning.recipes.shipped import find_recipe
from dyconvert.finetuning.recipes.yaml_file import read_yaml
from dyconvert.limits import JOBS


class SweepRun(Section):
    """A variant of the recipe: one row of the table, trained once with each seed."""

    name: Annotated[str, Field(pattern=r"^[\w.,=+-][\w.,=+ -]*$")]
    overrides: list[str] = []
    """Changes of this run, after the sweep's own overrides: convert.g=1."""


class Sweep(Section):
    """A recipe, the runs that vary it, and the seeds of each."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")] = "sweep"
    description: str = ""

    recipe: str
    """A shipped recipe's name, or a file, relative to the sweep's."""

    overrides: list[str] = []
    """Changes of every run."""

    runs: Annotated[list[SweepRun], Field(min_length=1, max_length=JOBS)]
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=JOBS)] = [0, 1, 2]

    @model_validator(mode="after")
    def _different(self) -> "Sweep":
        twice = sorted(name for name, count in Counter(run.name for run in self.runs).items() if count > 1)
        if twice:
            raise ValueError(f"runs have to have different names; {some(twice)} is there twice")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is given twice")
        return self

    def recipe_of(self, run: SweepRun, seed: int, directory: Path) -> Recipe:
        """The recipe of one run.

        Raises:
            RecipeError: with these overrides it has errors.
        """
        settings = [f"name={file_name(run.name)}", f"train.seed={seed}", f"output.directory={_yaml_text(directory)}"]
        try:
            return load_recipe(self.recipe, [*self.overrides, *run.overrides, *settings])
        except RecipeError as error:
            raise RecipeError(f"Run {run.name!r} of sweep {self.name}: {error}") from None

    def recipes(self) -> list[Recipe]:
        """Every run's recipe with the first seed, to check that all of them can be made.

        Raises:
            RecipeError: not all of them can; the errors of all runs are listed.
        """
        recipes, problems = [], []
        for run in self.runs:
            try:
                recipes.append(self.recipe_of(run, self.seeds[0], Path("runs")))
            except RecipeError as error:
                problems.append(str(error))
        if problems:
            raise RecipeError("\n".join(problems))
        return recipes


@dataclass(frozen=True)
class Job:
    """One run with one seed."""

    run: str
    seed: int
    recipe: Recipe

    def __str__(self) -> str:
        return f"{self.run}, seed {self.seed}"


def is_sweep(path: str | os.PathLike[str]) -> bool:
    """Whether a YAML file is a sweep: it has `runs`, and no `model`."""
    data = read_yaml(Path(path)).data
    return "runs" in data and "model" not in data


def load_sweep(sweep: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep.

    Args:
        sweep: name of a shipped sweep, or a YAML file.
        overrides: of every run's recipe, before the run's own, such as `data.root=DIR`.

    Raises:
        RecipeError: there is none, or it has errors; all of them are listed. The runs' recipes are not checked yet:
            :meth:`Sweep.recipes` does that.
    """
    path = find_recipe(sweep)
    document = read_yaml(path)
    if "runs" not in document.data:
        raise RecipeError(f"{path} is no sweep, it has no runs. `dyconvert finetune {sweep}` runs a recipe.")
    document.data.setdefault("name", path.stem)
    loaded = validated(Sweep, RecipeFile(path, document))
    base = loaded.recipe
    if base.endswith((".yaml", ".yml")):
        base = str(path.parent / os.path.expanduser(base))
    return loaded.model_copy(update={"recipe": base, "overrides": [*loaded.overrides, *overrides]})


def jobs_of(sweep: Sweep, directory: Path, only: Sequence[str] = (), seeds: Sequence[int] | None = None) -> list[Job]:
    """Every run with every seed. The first seed of all runs comes first, so that the table is complete early.

    Raises:
        RecipeError: no run matches `only`, or a recipe has errors.
    """
    chosen = [run for run in sweep.runs if not only or any(fnmatch.fnmatchcase(run.name, pattern) for pattern in only)]
    if not chosen:
        names = ", ".join(run.name for run in sweep.runs)
        raise RecipeError(f"No run's name matches {some(list(only))}. The runs are {names}.")
    if len(chosen) * len(seeds or sweep.seeds) > JOBS:
        raise RecipeError(
            f"{len(chosen)} runs with {len(seeds or sweep.seeds):,} seeds each are more than {JOBS:,} in all. Give "
            "fewer seeds, or choose runs: `only=[...]`."
        )
    directories: dict[str, str] = {}
    for run in chosen:
        other = directories.setdefault(file_name(run.name).lower(), run.name)
        if other != run.name:
            raise RecipeError(f"The runs {other!r} and {run.name!r} would share a directory. Rename one of them.")
    return [
        Job(run.name, seed, sweep.recipe_of(run, seed, directory / f"{file_name(run.name)}-seed{seed}"))
        for seed in (seeds or sweep.seeds)
        for run in chosen
    ]


def file_name(run: str) -> str:
    cleaned = "".join(c if c.isalnum() or c in "._" else "-" for c in run).strip("-._")
    return cleaned or "run"


def _yaml_text(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"
