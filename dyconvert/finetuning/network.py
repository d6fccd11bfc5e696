"""Makes the networks of a recipe: the original, and the converted or narrowed one that is trained."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert import models
from dyconvert.copying import copied
from dyconvert.errors import ModelError, brief
from dyconvert.finetuning.recipes.recipe import Recipe
from dyconvert.finetuning.training.outputs import outputs_of
from dyconvert.finetuning.training.teacher import Teacher
from dyconvert.surgery.convert import convert
from dyconvert.surgery.pairing import pair_experts


@dataclass
class Networks:
    """The original and the network that trains.

    Attributes:
        original: the pretrained network, with a new head if the recipe says so.
        source: the source of the original.
        student: the narrowed and converted network; a copy of the original if the recipe does neither.
        num_classes: number of outputs of both.
        teacher: None if the recipe doesn't distill.
    """

    original: nn.Module
    source: "models.Source"
    student: nn.Module
    num_classes: int
    teacher: Teacher | None = None


def create_original(recipe: Recipe) -> tuple[nn.Module, "models.Source"]:
    """The pretrained network. For the same seed, a new head or random weights are the same.

    Raises:
        ModelError: it can't be built, or not with these weights.
    """
    model = recipe.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        return models.create(
            model.specifier, model.weights, model.arguments, num_classes=model.num_classes, new_head=model.new_head
        )


def transform(
    original: nn.Module, recipe: Recipe, calibration: Callable[[], Iterable[Tensor]] | None = None
) -> nn.Module:
    """Narrow and convert a copy of the original, and pair its experts, as the recipe says.

    Args:
        calibration: returns batches of normalised training images, for narrowing and pairing; None: neither is done.
    """
    example = torch.zeros(2, *recipe.input_size)
    ours: dict[str, Any] = {"seed": recipe.train.seed, "diversity": recipe.dynamic.diversity, "example": example}
    conversion = None if recipe.convert is None else _conversion(recipe, recipe.convert.model_dump())
    if recipe.narrow is not None and calibration is not None:
        from dyconvert import narrow

        settings = recipe.narrow.model_dump()
        settings |= {"keep": tuple(settings["keep"]), "seed": recipe.train.seed, "example": example}
        if settings["init"] == "least-squares":
            settings["data"] = calibration()
        if conversion is None:
            return narrow(original, static=True, **settings)
        student = narrow(original, diversity=recipe.dynamic.diversity, **conversion, **settings)
    elif conversion is None:
        return copied(original)
    else:
        student = convert(original, **conversion, **ours)
    if recipe.dynamic.pair_spread is not None and calibration is not None:
        pair_experts(student, calibration(), spread=recipe.dynamic.pair_spread, seed=recipe.train.seed)
    return student


def _conversion(recipe: Recipe, chosen: dict[str, Any]) -> dict[str, Any]:
    schedule = recipe.dynamic.temperature
    return chosen if schedule is None else chosen | {"temperature": schedule.start}


def count_outputs(model: nn.Module, recipe: Recipe) -> int:
    """The number of classes of a network's output.

    Raises:
        ModelError: it can't take the recipe's images, or its output isn't one of a classifier or a segmenter.
    """
    size = "x".join(map(str, recipe.input_size))
    try:
        with torch.no_grad():
            logits: Tensor = next(outputs_of(model.eval()(torch.zeros(2, *recipe.input_size))))
    except Exception as error:
        raise ModelError(
            f"{recipe.model.specifier} can't take images of {size}: {brief(error)}. Set data.size and "
            "data.channels, or model.input_size."
        ) from error
    if logits.dim() != (4 if recipe.data.task == "segmentation" else 2):
        raise ModelError(
            f"{recipe.model.specifier} returns {tuple(logits.shape)} for two images of {size}, which isn't an output "
            f"of {recipe.data.task}. Check model.specifier and data.task."
        )
    return logits.shape[1]
