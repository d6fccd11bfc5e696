"""A recipe: from a pretrained model to a fine-tuned dynamic one, in one YAML file."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from dyconvert.errors import RecipeError
from dyconvert.finetuning.recipes.checking import Source, validated
from dyconvert.finetuning.recipes.schema import (
    Convert,
    Data,
    Distill,
    Dynamic,
    Model,
    Narrow,
    Output,
    Pretrain,
    Section,
    Train,
)
from dyconvert.finetuning.recipes.shipped import find_recipe
from dyconvert.finetuning.recipes.yaml_file import read_yaml

__all__ = ["Recipe", "load_recipe"]


class Recipe(Section):
    """A recipe, complete: what the YAML doesn't say has its default."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")] = "recipe"
    """Of the run, and of its output directory."""

    description: str = ""
    model: Model
    pretrain: Pretrain | None = None
    convert: Convert | None = Convert()
    narrow: Narrow | None = None
    data: Data
    train: Train = Train()
    dynamic: Dynamic = Dynamic()
    distill: Distill | None = None
    output: Output = Output()

    @model_validator(mode="after")
    def _sections_agree(self) -> "Recipe":
        problems = []
        segmentation = self.data.task == "segmentation"
        if segmentation and (self.train.mixup or self.train.cutmix):
            problems.append("train.mixup and train.cutmix are for classification, and data.task is segmentation")
        if segmentation != (self.data.augment == "segmentation") and self.data.augment != "none":
            problems.append(f"data.augment = {self.data.augment} doesn't go with data.task = {self.data.task}")
        if self.data.dataset.startswith(("imagefolder", "torchvision:")) and self.data.root is None:
            problems.append(f"data.root is missing: the folder of the {self.data.dataset} data")
        if self.model.input_size is not None and self.model.input_size[0] != self.data.channels:
            problems.append(
                f"model.input_size has {self.model.input_size[0]} channels, and data.channels is {self.data.channels}"
            )
        if self.model.new_head and self.distill is not None:
            problems.append("distill needs a teacher that knows the classes, and model.new_head leaves it none")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def directory(self) -> Path:
        """The output directory, absolute."""
        return _folder(self.output.directory.replace("{name}", self.name))

    @property
    def data_root(self) -> Path | None:
        """The folder of the data, absolute."""
        return None if self.data.root is None else _folder(self.data.root)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.model.input_size or (self.data.channels, self.data.size, self.data.size)

    def to_yaml(self) -> str:
        """Return the recipe as `load_recipe` reads it, with every key."""
        import yaml

        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=100)


def load_recipe(recipe: str | os.PathLike, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, and check all of it.

    Args:
        recipe: name of a shipped recipe, or a YAML file.
        overrides: such as `train.lr=0.01` or `convert=null`; the value is YAML.

    Raises:
        RecipeError: there is no such recipe, or it has errors; all of them are listed, each with its path, its
            line in the file and the nearest valid name.
    """
    path = find_recipe(recipe)
    document = read_yaml(path)
    if "runs" in document.data and "model" not in document.data:
        raise RecipeError(f"{path} is a sweep: `dyconvert recipes sweep {recipe}` runs it.")
    if isinstance(document.data, dict):
        document.data.setdefault("name", path.stem)
    loaded = validated(Recipe, Source(path, document, overrides))
    return resolved(loaded, path.parent)


def resolved(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with what its model names made plain.

    The model's Python file becomes an absolute path: in `folder`, or in the current one. In `weights`, ~ and
    $VARIABLES are expanded.
    """
    model = recipe.model
    changes = {"weights": os.path.expanduser(os.path.expandvars(model.weights))}
    location, colon, factory = model.specifier.rpartition(":")
    if location.endswith(".py"):
        file = folder / os.path.expanduser(location)
        file = file if file.is_file() else Path(os.path.expanduser(location))
        changes["specifier"] = f"{os.path.abspath(file)}{colon}{factory}"
    return recipe.model_copy(update={"model": model.model_copy(update=changes)})


def json_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "dyconvert recipe"} | {
        key: value for key, value in schema.items() if key != "title"
    }


def _folder(text: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(os.path.expandvars(text))))
