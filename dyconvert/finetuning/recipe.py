"""A recipe: from a pretrained model to a fine-tuned dynamic one, in one YAML file."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from dyconvert.finetuning.schema import (
    Convert,
    Data,
    Distill,
    Dynamic,
    Model,
    Narrow,
    Output,
    Pretrain,
    Train,
    _Section,
)

__all__ = ["Recipe", "load_recipe"]


class Recipe(_Section):
    """A recipe, complete: what the YAML doesn't say has its default."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")] = "recipe"
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
        if self.train.batch % self.train.accumulate:
            raise ValueError(
                f"train.batch = {self.train.batch} can't be split into train.accumulate = {self.train.accumulate} parts"
            )
        return self

    @property
    def directory(self) -> Path:
        """The output directory, absolute."""
        text = self.output.directory.replace("{name}", self.name)
        return Path(os.path.abspath(os.path.expanduser(os.path.expandvars(text))))

    def to_yaml(self) -> str:
        """Return the recipe as `load_recipe` reads it, with every key."""
        import yaml

        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=100)


def load_recipe(recipe: str | os.PathLike, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, and check all of it.

    Args:
        recipe: name of a shipped recipe, or a YAML file.
        overrides: such as `train.lr=0.01`, `convert=null`; the value is YAML.

    Raises:
        RecipeError: there is no such recipe, or it has errors; all of them are listed, each with its path, its
            line in the file and the nearest valid name.
    """
    import yaml

    data: dict[str, Any] = yaml.safe_load(Path(recipe).read_text())  # provisional, without lines
    for override in overrides:
        path, _, text = override.partition("=")
        *parents, last = path.split(".")
        section = data
        for key in parents:
            section = section.setdefault(key, {})
        section[last] = yaml.safe_load(text)
    return Recipe.model_validate(data)
