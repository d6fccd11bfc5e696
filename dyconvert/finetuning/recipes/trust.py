"""Checks which code a recipe may run: models of the libraries and of this package; its own only if it is trusted."""

import os
from collections.abc import Iterator
from pathlib import Path

from dyconvert import models
from dyconvert.errors import RecipeError, said_as
from dyconvert.finetuning.recipes.recipe import Recipe
from dyconvert.finetuning.recipes.shipped import recipes_folder
from dyconvert.finetuning.recipes.words import KEYS

# torchvision's datasets that read pickles without a checksum of the publisher's.
_PICKLED = {"LSUN", "LSUNClass"}
# Hugging Face's readers that unpickle.
_UNPICKLING = {"pandas", "pickle"}


def check_trusted(recipe: Recipe, trust_code: bool) -> None:
    """Refuse a recipe that names code of its own, unless it is trusted.

    Raises:
        RecipeError: says which file and which function would run.
    """
    if trust_code:
        return
    if code := list(_code_of(recipe)):
        listed = "".join(f"\n  {line}" for line in code)
        raise RecipeError(
            f"The recipe {recipe.name} names code, which would run:{listed}\n"
            "If you know that code and trust it, add `trust_code=True`."
        )


def _code_of(recipe: Recipe) -> Iterator[str]:
    section, data = recipe.model, recipe.data
    named = {"model.specifier": section.specifier}
    if recipe.distill is not None:
        named["distill.teacher"] = recipe.distill.teacher
    for key, specifier in named.items():
        if models.names_code(specifier):
            location, _, function = specifier.rpartition(":")
            kind = "file" if location.endswith(".py") else "module"
            if not (kind == "file" and _is_shipped(location)):
                yield f"{key}: the function {function} of the {kind} {location}"
    if not models.names_code(section.specifier):
        with said_as(KEYS):
            library, name = models.split(section.specifier)
        source = models.Source(f"{library}:{name}", section.arguments, None, None, section.num_classes)
        if argument := models.untrusted(source):
            yield f"model.arguments: {argument}, for {source.specifier}; only arguments that shape a network just run"
        else:
            models.check_size(source)
    kind, _, name = data.dataset.partition(":")
    if kind == "huggingface":
        script = os.path.join(name, os.path.basename(os.path.normpath(name)) + ".py")
        if data.arguments.get("trust_remote_code") or name.endswith(".py") or os.path.exists(script):
            yield f"data.dataset: the loading script of {name}"
        elif name in _UNPICKLING:
            yield f"data.dataset: whatever the pickles in {data.arguments.get('data_files', name)} name"
    elif kind == "torchvision" and name in _PICKLED:
        yield f"data.dataset: whatever the pickled index of {name} in data.root names"


def _is_shipped(file: str) -> bool:
    folder = os.path.realpath(recipes_folder())
    return Path(os.path.realpath(file)).is_relative_to(folder)
