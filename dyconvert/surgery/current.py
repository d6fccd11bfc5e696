"""The plan of a converted model as the model is now: users drop blocks and replace convs after the conversion."""

from torch import nn

from dyconvert.errors import ModelError
from dyconvert.nn import DynamicConv
from dyconvert.nn.handing import handing_of
from dyconvert.surgery.convert import check_converted
from dyconvert.surgery.plan import Plan


def current_plan(model: nn.Module) -> Plan:
    """The plan by which `model` was converted, without what it doesn't have any more.

    Convs that are gone aren't in it, and those with predictors of their own that were replaced by others are static.

    Raises:
        ModelError: `model` isn't what `convert` or `load` returned; or a conv was taken out of a block whose predictor
            serves others as well, which no plan describes.
    """
    plan = check_converted(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    left = [conv.name for conv in plan.converted if not isinstance(modules.get(conv.name), DynamicConv)]
    if not left and all(conv.name in modules for conv in plan.convs):
        return plan
    plan = plan.model_copy(deep=True)
    for name in left:
        conv = plan[name]
        if conv.block is not None and handing_of(modules.get(conv.block, _NOTHING)) is not None:
            raise ModelError(
                f"{name} was taken out or replaced after the conversion, and the predictor of {conv.block or 'all'} "
                f"still predicts for it. Convert the original with that conv left static: plan.skip({name!r})."
            )
        conv.skip("replaced after the conversion")
    plan.convs = [conv for conv in plan.convs if conv.name in modules]
    plan.blocks = [block for block in plan.blocks if plan.shared(block.name)]
    return plan


_NOTHING = nn.Module()
