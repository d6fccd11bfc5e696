"""plan(model) and convert(model): the two verbs of the package."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from dyconvert.copying import on_meta
from dyconvert.errors import ModelError, PlanError
from dyconvert.marks import fused_of, plan_of
from dyconvert.methods import Method, get_method
from dyconvert.names import within
from dyconvert.surgery.apply import carry_out, static_conv
from dyconvert.surgery.blocks import check_convertible, find
from dyconvert.surgery.plan import Plan
from dyconvert.surgery.trace import BlockTrace, Untraceable, trace_block
from dyconvert.surgery.trainable import Trainable, check_trainable, set_trainable


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
        method: `"dynet"`, `"condconv"`, `"dyconv"`, or a :class:`~dyconvert.methods.Method` of your own.
        g: number of experts per conv. None: the method's own, 6, 8 or 4.
        scope: `"block"` or `"layer"`: what one predictor serves. None: the method's own.
        reduction: the predictor's two linears have C_in / reduction hidden units; 0 for a single linear.
        temperature: divides the predictor's logits.
        include, exclude: shell patterns over the convs' names, or those of modules that hold them.
        include_stem: convert the conv that reads the image as well.
        strict: refuse a model with a block whose convs can't share a predictor. Otherwise they get one each, and
            the plan says why.
        example: an input, or the tuple of the forward's arguments, for a trial run on the meta device. None:
            common sizes are tried.

    Raises:
        ModelError: the model can't be converted: no convs, already converted, wrapped, compiled, ...
        PlanError: unknown method, g < 1, a pattern that matches nothing, ...
    """
    return _plan(model, method, g, scope, reduction, temperature, include, exclude, include_stem, strict, example)[0]


def _plan(
    model: nn.Module,
    method: str | Method = "dynet",
    g: int | None = None,
    scope: str | None = None,
    reduction: int | None = None,
    temperature: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    include_stem: bool = False,
    strict: bool = False,
    example: Any = None,
) -> tuple[Plan, dict[str, BlockTrace]]:
    chosen = get_method(method, g=g, scope=scope, reduction=reduction, temperature=temperature)
    return find(
        model,
        chosen,
        include=_sequence(include),
        exclude=_sequence(exclude),
        include_stem=include_stem,
        strict=strict,
        example=example,
    )


def _sequence(patterns: str | Sequence[str]) -> Sequence[str]:
    return (patterns,) if isinstance(patterns, str) else patterns


def convert(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    inplace: bool = False,
    seed: int = 0,
    diversity: float = 0.1,
    trainable: Trainable | None = None,
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
        progress: called with a conv's name, how many are done, and how many there are.

    Raises:
        ModelError: the model can't be converted.
        PlanError: the plan doesn't fit the model.
    """
    if plan is not None and choices:
        raise PlanError(f"convert() got a plan and {', '.join(choices)}: the plan has decided that. Give one of them.")
    if plan is None:
        plan, traces = _plan(model, **choices)
    else:
        check_convertible(model)
        traces = _retrace(model, plan)
    if not plan.converted:
        reasons = "; ".join(f"{count} {reason}" for reason, count in plan.reasons().items())
        raise PlanError(
            f"Not one conv of {type(model).__name__} is to be converted: {reasons}. Widen include, exclude less, or "
            "convert the stem: include_stem=True."
        )
    if trainable is not None:
        check_trainable(trainable)
    model = carry_out(model, plan, traces, inplace=inplace, seed=seed, diversity=diversity, progress=progress)
    return model if trainable is None else set_trainable(model, trainable)


def rebuild(model: nn.Module, plan: Plan) -> nn.Module:
    """Convert `model` in place without filling the experts, whose values will be loaded."""
    check_convertible(model)
    return carry_out(model, plan, _retrace(model, plan), inplace=True, seed=0, diversity=None)


def preview(model: nn.Module, plan: Plan) -> nn.Module:
    """The converted architecture on the meta device: its parameters and MACs, without its memory."""
    return rebuild(on_meta(model), plan)


def _retrace(model: nn.Module, plan: Plan) -> dict[str, BlockTrace]:
    """The traces that a plan's shared blocks need, from a model that it was made for."""
    bare = on_meta(model)
    traces = {}
    names = {block.name for block in plan.blocks}
    for entry in plan.converted:
        if entry.block is not None and entry.block not in names:
            raise PlanError(f"The plan has {entry.name} share with block {entry.block!r}, which it doesn't list.")
    for block in plan.blocks:
        entries = plan.shared(block.name)
        if not entries:
            continue
        convs = {within(block.name, entry.name): static_conv(bare, entry) for entry in entries}
        try:
            module = bare.get_submodule(block.name)
            traces[block.name] = trace_block(module, convs, known=(block.reads, block.in_channels, block.given))
        except (Untraceable, AttributeError) as why:
            raise PlanError(
                f"The convs of block {block.name!r} can't share a predictor: {why}. "
                f"Give them their own: plan.unshare('{block.name}.*')."
            ) from why
    return traces


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
    found = plan_of(model)
    if found is None:
        raise ModelError(
            f"{type(model).__name__} isn't what dyconvert.convert or dyconvert.load returned. "
            "Pass that model itself, not a part or a wrapper of it."
        )
    return found
