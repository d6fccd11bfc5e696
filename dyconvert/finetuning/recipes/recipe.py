"""A recipe: from a pretrained model to a fine-tuned dynamic one, in one YAML file."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from dyconvert.errors import RecipeError
from dyconvert.finetuning.recipes.checking import RecipeFile, validated
from dyconvert.finetuning.recipes.schema import (
    VIEWS,
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
from dyconvert.paths import current_folder, shown

__all__ = ["Recipe", "load_recipe"]


class Recipe(Section):
    """A complete recipe: keys that the YAML leaves out have their defaults."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")] = "recipe"
    """The run's name, and its output directory's."""

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
        distill = self.distill
        if distill is not None:
            if self.model.new_head and distill.teacher == "original":
                problems.append("distill needs a teacher that knows the classes, and model.new_head leaves it none")
            if distill.cache and self.data.views is None:
                problems.append("distill.cache needs data.views: in how many crops and flips each image is seen")
            if distill.cache and (self.train.mixup or self.train.cutmix):
                problems.append("distill.cache is of single images, and train.mixup and train.cutmix mix them")
            if distill.features and self.train.compile:
                problems.append("distill.features doesn't go with train.compile")
            if distill.features and segmentation:
                problems.append("distill.features is for classification, and data.task is segmentation")
            for key in ("teacher_mean", "teacher_std"):
                values = getattr(distill, key)
                if values is not None and len(values) != self.data.channels:
                    problems.append(f"distill.{key} has {len(values)} numbers for {self.data.channels} channels")
        if self.data.views is not None and self.data.augment not in VIEWS:
            problems.append(f"data.views goes with data.augment = {', '.join(VIEWS)}, and not {self.data.augment}")
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


def load_recipe(recipe: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
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
    loaded = validated(Recipe, RecipeFile(path, document, overrides))
    return resolved(loaded, path.parent)


def resolved(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with the names that its model uses written out.

    A model's or teacher's Python file becomes an absolute path: in `folder`, or in the current one. In weights, ~ and
    $VARIABLES are expanded.
    """
    model = recipe.model
    changes = {
        "specifier": _specifier(model.specifier, folder),
        "weights": os.path.expanduser(os.path.expandvars(model.weights)),
    }
    changed: dict[str, Any] = {"model": model.model_copy(update=changes)}
    if recipe.distill is not None:
        ours = recipe.distill
        teacher = {
            "teacher": _specifier(ours.teacher, folder),
            "teacher_weights": os.path.expanduser(os.path.expandvars(ours.teacher_weights)),
        }
        changed["distill"] = ours.model_copy(update=teacher)
    return recipe.model_copy(update=changed)


def _specifier(specifier: str, folder: Path) -> str:
    """The specifier, with a Python file's path absolute: in `folder`, or in the current one."""
    location, colon, factory = specifier.rpartition(":")
    if not location.endswith(".py"):
        return specifier
    file = folder / os.path.expanduser(location)
    file = file if file.is_file() else Path(os.path.expanduser(location))
    absolute = f"{_absolute(file)}{colon}{factory}"
    if shown(absolute) != absolute:
        raise RecipeError(
            f"{shown(absolute)} has a name that is no text, and a recipe is one: it couldn't be written down for this "
            "run. Rename the folder or the file."
        )
    return absolute


def json_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "dyconvert recipe"} | {
        key: value for key, value in schema.items() if key != "title"
    }


def _folder(text: str) -> Path:
    return _absolute(os.path.expanduser(os.path.expandvars(text)))


def _absolute(path: str | Path) -> Path:
    return Path(os.path.normpath(path if os.path.isabs(path) else current_folder(RecipeError) / path))
