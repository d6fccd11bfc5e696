"""The output directory: which recipe's run it holds, and whether that is finished."""

import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dyconvert.checkpoint import check_writable
from dyconvert.errors import RecipeError, brief, said_as, some
from dyconvert.files import names_in, remove_leftovers, write_file
from dyconvert.finetuning.recipes.recipe import Recipe, load_recipe
from dyconvert.finetuning.summary import Summary, write_json
from dyconvert.finetuning.training.trainers import is_main_process
from dyconvert.limits import JSON_BYTES, parse_json, read_text
from dyconvert.locks import Claim
from dyconvert.run_files import BEFORE, CHECKPOINT, LOCK, RECIPE, RUN_FILES

# Keys that may change when a run is resumed: its result doesn't depend on them.
_FREE: dict[str, Any] = {
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
        before: the metrics before training; None until they are measured.
        finished: the summary of a finished run.
    """

    recipe: Recipe
    before: dict[str, Any] | None = None
    finished: Summary | None = None
    _claim: Claim | None = field(default=None, repr=False)

    def begin(self) -> None:
        """Make the directory, keep other processes from running there, and write the recipe down.

        Raises:
            RecipeError: another process runs there, or has begun a run since it was looked at; or it can't be written.
        """
        directory = self.recipe.directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"{directory} can't be written: {brief(error)}. Set output.directory.") from error
        if self._claim is None:
            self.claim()
            if (directory / RECIPE).exists():
                self.close()
                raise RecipeError(f"Another process has begun a run in {directory}. Set output.directory.")
        write_file(directory / RECIPE, self.recipe.to_yaml(), RecipeError)

    def claim(self) -> None:
        """Keep other processes from running there, until `close`.

        Raises:
            RecipeError: one does.
        """
        claim = Claim(self.recipe.directory / LOCK)
        try:
            claimed = claim.take()
        except OSError as error:
            raise RecipeError(
                f"{self.recipe.directory} can't be written: {brief(error)}. Set output.directory."
            ) from error
        if not claimed:
            raise RecipeError(
                f"A run is going on in {self.recipe.directory}. Wait for its end, stop it, or set output.directory."
            )
        self._claim = claim

    def record_before(self, before: dict[str, Any]) -> None:
        """Write down the metrics before training: a resumed run doesn't measure them again."""
        write_json(self.recipe.directory / BEFORE, before)

    def tidy(self) -> None:
        """Remove files that a finished run doesn't need. A process that was killed at its very end leaves them."""
        with contextlib.suppress(OSError):  # a run on a disk that can't be written is finished all the same
            (self.recipe.directory / CHECKPOINT).unlink(missing_ok=True)
            remove_leftovers(self.recipe.directory)

    def close(self) -> None:
        """Let other processes run there."""
        if self._claim is not None:
            self._claim.release()
            self._claim = None


def open_run(recipe: Recipe, resume: bool) -> Run:
    """Open the run in the recipe's directory.

    Raises:
        RecipeError: the directory holds a run and `resume` is false; or `resume` is true and it holds none, or another
            recipe's; another process runs there; links are in the place of its files.
        CheckpointError: the directory holds other files.
    """
    directory = recipe.directory
    if not is_main_process() and not resume:  # the first process may have made it already
        return Run(recipe)
    exists = (directory / RECIPE).is_file()
    _refuse_links(directory)
    if not resume:
        if exists:
            how = "a finished run" if Summary.read(directory) else "a run that was interrupted"
            raise RecipeError(
                f"{directory} holds {how}. Continue it with `resume=True`, set output.directory, or remove it."
            )
        # A run that is killed at its very start leaves at most the lock.
        if not (directory.is_dir() and names_in(directory) == {LOCK}):
            with said_as({"directory": "output.directory", "force": None}):
                check_writable(directory)
        return Run(recipe)
    if not exists:
        raise RecipeError(
            f"{directory} holds no run to resume. Start it without `resume=True`, or check output.directory."
        )
    run = Run(recipe)
    if is_main_process():
        run.claim()
    try:
        if changes := _differences(load_recipe(directory / RECIPE), recipe):
            raise RecipeError(
                f"{directory} holds a run of another recipe: {some(changes)}. Resume it with its own recipe, "
                f"{directory / RECIPE}, or set output.directory for a new run."
            )
        run.before, run.finished = _metrics(directory / BEFORE), Summary.read(directory)
    except BaseException:
        run.close()
        raise
    return run


def depends_on(recipe: Recipe) -> dict[str, Any]:
    """The keys that a run's result depends on: a resumed run has the same ones."""
    return recipe.model_dump(mode="json", exclude=_FREE)


def fingerprint(recipe: Recipe) -> str:
    """A short hash of the keys that the result depends on. Keys with default values don't enter it: so keys that later
    versions add don't change it."""
    content = recipe.model_dump(mode="json", exclude=_FREE, exclude_defaults=True)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _refuse_links(directory: Path) -> None:
    links = [name for name in RUN_FILES if (directory / name).is_symlink()]
    if links:
        raise RecipeError(
            f"{directory} has links in the place of a run's files: {some(links)}. What a run writes stays in its "
            "directory: remove them, or set output.directory."
        )


def _metrics(file: Path) -> dict[str, float | None] | None:
    """The metrics before training, if they were written, and are numbers."""
    try:
        metrics = parse_json(read_text(file, JSON_BYTES))
        original, converted = metrics["original"], metrics["converted"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if type(original) not in (int, float) or type(converted) not in (int, float, type(None)):
        return None
    return {"original": original, "converted": converted}


def _differences(before: Recipe, now: Recipe) -> list[str]:
    old, new = (_flat(depends_on(recipe)) for recipe in (before, now))
    return [
        f"{key} was {json.dumps(old.get(key))} and is {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
