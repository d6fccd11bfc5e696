"""The output directory: whose run it holds, and how far that is."""

import json
from dataclasses import dataclass
from typing import Any

from dyconvert.checkpoint import check_writable
from dyconvert.errors import RecipeError, brief, some
from dyconvert.finetuning.recipes.recipe import Recipe, load_recipe
from dyconvert.finetuning.summary import Summary, write_json
from dyconvert.finetuning.training.trainers import is_main_process

RECIPE = "recipe.yaml"
BEFORE = "before.json"
_PART = RECIPE + ".part"

# What may change between two tries of a run: the result doesn't depend on it.
_FREE = {
    "name": True,
    "description": True,
    "output": True,
    "data": {"root", "download", "workers", "skip_corrupt"},
    "distill": {"cache_directory"},
    "train": {"accelerator", "devices", "nodes", "strategy", "eval_batch"},
}


@dataclass
class Run:
    """A run in its directory.

    Attributes:
        before: the metrics before training, once they are known.
        finished: its summary, if it ended.
    """

    recipe: Recipe
    before: dict[str, Any] | None = None
    finished: Summary | None = None

    def begin(self) -> None:
        """Make the directory and write the recipe down."""
        directory = self.recipe.directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            part = directory / _PART
            part.write_text(self.recipe.to_yaml(), encoding="utf-8")
            part.replace(directory / RECIPE)
        except OSError as error:
            raise RecipeError(f"{directory} can't be written: {brief(error)}. Set output.directory.") from error

    def keep(self, before: dict[str, Any]) -> None:
        """Write down the metrics before training: a resumed run doesn't measure them again."""
        write_json(self.recipe.directory / BEFORE, before)


def open_run(recipe: Recipe, resume: bool) -> Run:
    """Look at what the recipe's directory holds.

    Raises:
        RecipeError: a run that isn't to be resumed; nothing or another recipe's run, if one is.
        CheckpointError: other things.
    """
    directory = recipe.directory
    exists = (directory / RECIPE).is_file()
    if not exists and is_main_process():  # all that a run killed at its very start can leave
        (directory / _PART).unlink(missing_ok=True)
    if not resume:
        if not is_main_process():  # the first process has made it meanwhile
            return Run(recipe)
        if exists:
            how = "a finished run" if Summary.read(directory) else "a run that was interrupted"
            raise RecipeError(
                f"{directory} holds {how}. Continue it with `resume=True`, set output.directory, or remove it."
            )
        check_writable(directory)
        return Run(recipe)
    if not exists:
        raise RecipeError(
            f"{directory} holds no run to resume. Start it without `resume=True`, or check output.directory."
        )
    before = load_recipe(directory / RECIPE)
    if changes := _differences(before, recipe):
        raise RecipeError(
            f"{directory} holds a run of another recipe: {some(changes)}. Resume it with its own recipe, "
            f"{directory / RECIPE}, or set output.directory for a new run."
        )
    try:
        metrics = json.loads((directory / BEFORE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        metrics = None
    return Run(recipe, metrics, Summary.read(directory))


def _differences(before: Recipe, now: Recipe) -> list[str]:
    old, new = (_flat(recipe.model_dump(mode="json", exclude=_FREE)) for recipe in (before, now))
    return [
        f"{key} was {json.dumps(old.get(key))} and is {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
