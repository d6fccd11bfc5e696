"""The recipes and sweeps that come with the package."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path

from dyconvert.errors import RecipeError
from dyconvert.finetuning.recipes.yaml_file import read_yaml
from dyconvert.paths import as_path

_PACKAGE = Path(__file__).resolve().parents[2]


def recipes_folder() -> Path:
    """The folder of the shipped recipes: in the package once installed, beside it in a source checkout.

    Raises:
        RecipeError: there is neither.
    """
    for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes"):
        if (folder / "quickstart.yaml").is_file():
            return folder
    raise RecipeError(
        f"The recipes that come with dyconvert are in neither {_PACKAGE} nor its parent; install it anew."
    )


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes' files, by name."""
    return {file.stem: file for file in sorted(recipes_folder().glob("*.yaml"))}


def shipped_sweeps() -> dict[str, Path]:
    """The shipped sweeps' files, by name."""
    return {file.stem: file for file in sorted((recipes_folder() / "sweeps").glob("*.yaml"))}


def descriptions(files: Mapping[str, Path]) -> dict[str, str]:
    """Each file's own description."""
    return {name: str(read_yaml(file).data.get("description", "")) for name, file in files.items()}


def find_recipe(recipe: str | os.PathLike[str]) -> Path:
    """The file of a recipe or sweep, from its shipped name or its path.

    A bare name is a shipped one, whatever lies in the current folder; a file is named as one: `./quickstart.yaml`.

    Raises:
        RecipeError: there is none.
    """
    as_path(recipe, RecipeError)
    text = os.fspath(recipe)
    path = Path(os.path.expanduser(text))
    if isinstance(recipe, os.PathLike) or path.suffix in (".yaml", ".yml") or os.sep in text or "/" in text:
        try:
            if path.is_file():
                return path
            what = "is no ordinary file" if path.exists() else "doesn't exist"
        except (OSError, ValueError) as error:
            what = f"can't be used: {error}"
        raise RecipeError(f"The file {text} {what}. Shipped recipes go by their names: `dyconvert recipes ls`.")
    known = shipped_recipes() | shipped_sweeps()
    if text in known:
        return known[text]
    near = difflib.get_close_matches(text, known, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]}?" if near else ""
    if os.path.isfile(text):
        hint += f" The file of that name is ./{text}."
    raise RecipeError(f"There is no recipe {text!r}.{hint} `dyconvert recipes ls` lists them; a file ends with .yaml.")
