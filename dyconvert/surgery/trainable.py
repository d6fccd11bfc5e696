"""Which parameters train: a choice for the start of fine-tuning, and for schedules in it."""

from typing import Literal, get_args

from torch import nn

from dyconvert.arguments import check_module
from dyconvert.errors import PlanError
from dyconvert.nn import CoefficientPredictor, DynamicConv
from dyconvert.nn.convs import refuse_compressed

Trainable = Literal["all", "experts", "predictors"]


def check_trainable(what: str) -> None:
    """Refuse what :func:`set_trainable` doesn't know.

    Raises:
        PlanError: `what` is none of :data:`Trainable`.
    """
    if what not in get_args(Trainable):
        raise PlanError(f"trainable is one of {', '.join(get_args(Trainable))}, not {what!r}.")


def set_trainable(model: nn.Module, what: Trainable) -> nn.Module:
    """Set `requires_grad` of every parameter of a converted model.

    Args:
        what: `"predictors"`: these alone. `"experts"`: the dynamic convs' weight sets and the predictors.
            `"all"`: everything, also what the user had frozen.

    Returns:
        The model itself.

    Raises:
        ModelError: the model is no module.
        PlanError: `what` is none of these.
        ModelError: the model is compressed.

    Examples:
        >>> import dyconvert, torch
        >>> from dyconvert.builtin import DigitsResNet8
        >>> model, image = DigitsResNet8().eval(), torch.rand(2, 1, 8, 8)
        >>> dynamic = dyconvert.convert(model, g=4, example=image)
        >>> _ = dyconvert.set_trainable(dynamic, "predictors")
        >>> sorted({name.split(".")[-2] for name, p in dynamic.named_parameters() if p.requires_grad})
        ['linear']
    """
    check_module(model)
    check_trainable(what)
    refuse_compressed(model)
    model.requires_grad_(what == "all")
    for module in model.modules():
        if isinstance(module, CoefficientPredictor):
            module.requires_grad_(True)
        elif isinstance(module, DynamicConv) and what == "experts":
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
    return model
