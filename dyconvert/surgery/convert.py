"""plan(model) and convert(model): the two verbs of the package."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dyconvert.arguments import as_arguments, in_dtype
from dyconvert.copying import on_meta, sharing_copy
from dyconvert.errors import ModelError, PlanError
from dyconvert.limits import DIVERSITY
from dyconvert.marks import fused_of, plan_of
from dyconvert.methods import Method, get_method
from dyconvert.names import checked_patterns
from dyconvert.numbers import real, seed_of
from dyconvert.randomness import kept_random_state
from dyconvert.surgery.apply import apply
from dyconvert.surgery.blocks import check_convertible
from dyconvert.surgery.check import check_result
from dyconvert.surgery.example import example_for, random_images
from dyconvert.surgery.old_plans import up_to_date
from dyconvert.surgery.plan import Plan
from dyconvert.surgery.planning import make_plan
from dyconvert.surgery.trainable import Trainable, check_trainable, set_trainable
from dyconvert.torch_internals.trees import tree_leaves


def plan(
    model: nn.Module,
    method: str | Method = "dynet",
    g: int | None = None,
    *,
    scope: str | None = None,
    reduction: int | None = None,
    temperature: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    include_stem: bool = False,
    strict: bool = False,
    example: Any = None,
) -> Plan:
    """Plan a conversion: what becomes of every conv of `model`, which is left as it is.

    Args:
        model: any module with convs.
        method: a name out of `dyconvert.METHODS`, or a :class:`~dyconvert.methods.Method` of your own.
        g: number of experts per conv. None: the method's own.
        scope: `"block"` or `"layer"`: what one predictor serves. None: the method's own.
        reduction: the predictor's two linears have C_in / reduction hidden units; 0 for a single linear.
        temperature: divides the predictor's logits.
        include, exclude: shell patterns over the convs' names, or those of modules that hold them.
        include_stem: convert the conv that reads the image as well.
        strict: refuse a model with a block whose convs can't share a predictor. Otherwise they get one each, and
            the plan says why.
        example: an input, the tuple of the forward's arguments, or a dict of its keyword arguments, for trial runs of
            copies. None: common sizes are tried.

    Raises:
        ModelError: the model can't be converted: no convs, already converted, wrapped, compiled, ...
        PlanError: unknown method, g < 1, a pattern that matches nothing, ...

    Examples:
        >>> import dyconvert, torch
        >>> from dyconvert.builtin import DigitsResNet8
        >>> model, image = DigitsResNet8().eval(), torch.rand(2, 1, 8, 8)
        >>> plan = dyconvert.plan(model, method="condconv", g=4, example=image)
        >>> plan.skip("layer3.*")
        >>> len(plan.converted), len(plan.convs)
        (5, 9)
    """
    chosen = get_method(method, g=g, scope=scope, reduction=reduction, temperature=temperature)
    patterns = {"include": checked_patterns(include), "exclude": checked_patterns(exclude)}
    with kept_random_state():
        return make_plan(model, chosen, **patterns, include_stem=include_stem, strict=strict, example=example)


_plan = plan  # convert() has a parameter of that name


def convert(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    inplace: bool = False,
    seed: int = 0,
    diversity: float = 0.1,
    trainable: Trainable | None = None,
    example: Any = None,
    check: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
    **choices: Any,
) -> nn.Module:
    """Give every planned conv g weight sets, mixed per image by predicted coefficients.

    The result computes what `model` does until it is trained, and is a model of the same class, with the same
    names, attributes, hooks, devices, dtypes and `requires_grad`. Predictors are trainable.

    Args:
        model: any module with convs; left as it is, unless `inplace`.
        plan: what to do, from :func:`plan`. None: it is made from `choices`, which :func:`plan` lists
            (`method="dynet", g=6, ...`).
        inplace: change `model` itself. After an error it is still untouched.
        seed: of the experts' differences and the predictors' hidden layers. The global generator isn't used.
        diversity: how far the experts differ at first, relative to each output channel's root mean square.
        trainable: None: what was frozen stays frozen, experts are as their static weights were, and predictors
            train. `"predictors"`, `"experts"` or `"all"`: as :func:`~dyconvert.set_trainable` says.
        example: what :func:`plan` takes as its example; the check's input as well. None: the plan's.
        check: at the end, run the original and the result on the example, and refuse a result that differs. It takes
            about as long as the two runs; a model on the meta device, or one whose input isn't known, isn't checked.
        progress: called with a conv's name, how many are done, and how many there are.

    Raises:
        ModelError: the model can't be converted, or the result doesn't compute what it does.
        PlanError: the plan doesn't fit the model; the seed or the diversity is out of range.

    Examples:
        >>> import dyconvert, torch
        >>> from dyconvert.builtin import DigitsResNet8
        >>> model, image = DigitsResNet8().eval(), torch.rand(2, 1, 8, 8)
        >>> dynamic = dyconvert.convert(model, method="dynet", g=4, example=image)
        >>> type(dynamic) is type(model)
        True
        >>> torch.allclose(dynamic(image), model(image), atol=1e-4)
        True
    """
    seed, diversity = seed_of(seed), real("diversity", diversity, 0, DIVERSITY)
    if plan is not None and not isinstance(plan, Plan):
        raise PlanError(
            f"A Plan is needed, not {type(plan).__name__}. Make one by dyconvert.plan(model, ...), or give choices by "
            "name: method=, g=, example=, ..."
        )
    if plan is not None and choices:
        raise PlanError(f"convert() got a plan and {', '.join(choices)}: the plan has decided that. Give one of them.")
    check_convertible(model)
    plan = _plan(model, example=example, **choices) if plan is None else up_to_date(plan, model)
    if not plan.converted:
        reasons = "; ".join(f"{count} {reason}" for reason, count in plan.reasons().items())
        raise PlanError(
            f"Not one conv of {type(model).__name__} is to be converted: {reasons}. Widen include, exclude less, or "
            "convert the stem: include_stem=True."
        )
    if trainable is not None:
        check_trainable(trainable)
    example = example_of(model, plan, example) if check else None
    original = None
    if example is not None:
        # In place, the model will be another one; the copy has its parameters.
        original = sharing_copy(model) if inplace else model
    converted, undo = apply(model, plan, inplace=inplace, seed=seed, diversity=diversity, progress=progress)
    if original is not None:
        try:
            check_result(original, converted, example)
        except BaseException:
            undo()
            raise
    return converted if trainable is None else set_trainable(converted, trainable)


def example_of(model: nn.Module, plan: Plan | None, example: Any) -> Any:
    """What to check a changed model on: an example with values, or None where there is none."""
    if any(t.is_meta for t in model.parameters()):
        return None  # a model without values computes nothing
    if example is None and plan is not None:
        example = plan.example
    if example is None:
        try:
            return example_for(model)
        except ModelError:
            return None  # the plan warns that no input is known
    if any(t.is_meta for t in tree_leaves(example) if isinstance(t, Tensor)):
        arguments: Any = example if isinstance(example, dict) else as_arguments(example)
        return random_images(arguments, next(model.parameters()).device, 2)
    return in_dtype(model, example)


def rebuild(model: nn.Module, plan: Plan) -> nn.Module:
    """Convert `model` in place without filling the experts, whose values will be loaded."""
    check_convertible(model)
    return apply(model, up_to_date(plan, model), inplace=True, seed=0, diversity=None)[0]


def preview(model: nn.Module, plan: Plan) -> nn.Module:
    """The converted architecture on the meta device: its parameters and MACs, without its memory."""
    return rebuild(on_meta(model), plan)


def check_converted(model: nn.Module) -> Plan:
    """The plan by which `model` was converted.

    Raises:
        ModelError: it isn't a model that :func:`convert` or `load` returned.
    """
    if fused_of(model) is not None:
        raise ModelError(
            f"This {type(model).__name__} was fused: its batch norms are in its convs, and no plan describes that. "
            "Do this with the model before it was fused, and fuse after loading."
        )
    plan = plan_of(model)
    if plan is None:
        raise ModelError(
            f"{type(model).__name__} isn't what dyconvert.convert or dyconvert.load returned. "
            "Pass that model itself, not a part or a wrapper of it."
        )
    return plan
