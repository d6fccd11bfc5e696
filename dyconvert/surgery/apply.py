"""Carries a plan out: dynamic convs in the place of static ones, hooks on the blocks that share a predictor."""

from collections.abc import Callable, Collection, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dyconvert.copying import keep_tensor_hooks, skeleton
from dyconvert.errors import PlanError
from dyconvert.marks import forget_plan, mark_plan
from dyconvert.methods import Method
from dyconvert.names import holds, within
from dyconvert.nn import CoefficientPredictor, DynamicConv
from dyconvert.nn.counterparts import DYNAMIC_OF
from dyconvert.nn.handing import Handing, share
from dyconvert.nn.mixture import sizes_for
from dyconvert.surgery.adapters import static_padding, static_weight, unsupported
from dyconvert.surgery.expand import Deviations, empty_bank, expand
from dyconvert.surgery.plan import Plan, PlannedBlock, PlannedConv
from dyconvert.torch_internals.copies import keep_when_copied
from dyconvert.torch_internals.modules import child_table

# Some prime, so that the convs take their deviations from different places of the table.
_OFFSET = 7919


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    inplace: bool,
    seed: int,
    diversity: float | None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[nn.Module, Callable[[], None]]:
    """What :func:`convert` does when the plan is made. `diversity=None` leaves the experts unfilled.

    Returns:
        The converted model, and a function that takes back what was done to it.

    Raises:
        PlanError: the plan doesn't fit the model, which is still as it was.
    """
    static = {entry.name: static_conv(model, entry) for entry in plan.converted}
    handings = {block.name: _handing(model, plan, block) for block in plan.blocks if plan.shared(block.name)}
    _check_blocks(plan)
    if not inplace:
        # The convs' weights are about to be replaced, so the copy may share them with the original until then.
        replaced = {id(t) for conv in static.values() for t in (conv.weight, conv.bias) if t is not None}
        original, model = model, skeleton(model, lambda t: t if id(t) in replaced else t.detach().clone())
        keep_tensor_hooks(original, model)
        static = {name: model.get_submodule(name) for name in static}
    # All that is new is made first: after an error the model is as it was. It is made on the CPU, whatever the caller's
    # default device is, and goes to its conv's device.
    with torch.device("cpu"):
        replacements, predictors = _made(plan, static, seed, diversity, progress)

    converted = replace_everywhere(model, replacements)
    handles = []
    for name, handing in handings.items():
        block = converted.get_submodule(name)
        handles += share(block, handing, cast(CoefficientPredictor, set_mode(predictors[name], block.training)))
    mark_plan(converted, plan)
    for module in converted.modules():
        if isinstance(module, GraphModule):
            keep_when_copied(module)

    def undo() -> None:
        for handle in handles:
            handle.remove()
        replace_everywhere(converted, {new: old for old, new in replacements.items()})
        forget_plan(converted)

    return converted, undo


def _made(
    plan: Plan,
    static: dict[str, nn.Module],
    seed: int,
    diversity: float | None,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[dict[nn.Module, nn.Module], dict[str, CoefficientPredictor]]:
    """The dynamic conv for each static one, and the predictor of each block that shares one."""
    fill = _Expansion(plan.method, seed, diversity)
    generator = torch.Generator().manual_seed(seed)
    replacements: dict[nn.Module, nn.Module] = {}
    for done, entry in enumerate(plan.converted, 1):
        predictor = None
        conv = static[entry.name]
        if entry.block is None:
            predictor = _predictor(entry.in_channels, [conv], plan.method, generator)
        replacements[conv] = _dynamic(conv, plan.method, fill, predictor, done)
        if progress is not None:
            progress(entry.name, done, len(static))
    predictors = {}
    for block in plan.blocks:
        if entries := plan.shared(block.name):
            convs = [static[entry.name] for entry in entries]
            predictors[block.name] = _predictor(block.in_channels, convs, plan.method, generator)
    return replacements, predictors


def static_conv(model: nn.Module, entry: PlannedConv) -> nn.Module:
    """The static conv that a plan's entry speaks of.

    Raises:
        PlanError: the model has no such conv, or it can't become dynamic.
    """
    try:
        conv = model.get_submodule(entry.name)
    except AttributeError:
        raise PlanError(
            f"The plan names the conv {entry.name!r}, which {type(model).__name__} doesn't have. "
            "Plan this model afresh."
        ) from None
    shape = (
        tuple(getattr(conv, "kernel_size", ())),
        getattr(conv, "in_channels", 0),
        getattr(conv, "out_channels", 0),
    )
    if shape != (entry.kernel_size, entry.in_channels, entry.out_channels):
        raise PlanError(
            f"The plan has {entry.name} as {entry.label}, but the model has {conv}. Plan this model afresh."
        )
    if reason := unsupported(conv):
        raise PlanError(f"{entry.name} can't be converted: {reason}. Skip it: plan.skip({entry.name!r}).")
    return conv


def _check_blocks(plan: Plan) -> None:
    listed = {block.name for block in plan.blocks}
    for entry in plan.converted:
        if entry.block is not None and (entry.block not in listed or not holds(entry.block, entry.name)):
            raise PlanError(
                f"The plan has {entry.name} share with block {entry.block!r}, which it doesn't list or which doesn't "
                "hold it. Plan this model afresh."
            )


def _handing(model: nn.Module, plan: Plan, block: PlannedBlock) -> Handing:
    names = [within(block.name, entry.name) for entry in plan.shared(block.name)]
    try:
        return Handing(model.get_submodule(block.name).forward, block.reads, names)
    except (AttributeError, ValueError, TypeError) as why:
        raise PlanError(
            f"The convs of block {block.name!r} can't share a predictor: {why}. "
            f"Give them their own: plan.unshare({_pattern(block.name)!r})."
        ) from why


def _pattern(block: str) -> str:
    return f"{block}.*" if block else "*"


class _Expansion:
    """Makes banks: expanded from the static weights, or unfilled."""

    def __init__(self, method: Method, seed: int, diversity: float | None) -> None:
        self.method = method
        self.diversity = diversity
        self.seed = seed
        self.tables: dict[tuple[torch.dtype, torch.device], Deviations] = {}

    def __call__(self, static: Tensor, number: int, requires_grad: bool) -> nn.Parameter:
        if self.diversity is None:
            return nn.Parameter(empty_bank(static, self.method.g), requires_grad)
        key = static.dtype, static.device
        if key not in self.tables:
            self.tables[key] = Deviations(self.method.g, self.seed, *key)
        bank = expand(static, self.method, self.tables[key], self.diversity, offset=number * _OFFSET)
        return nn.Parameter(bank, requires_grad)


def _predictor(
    in_channels: int, convs: Sequence[nn.Module], method: Method, generator: torch.Generator
) -> CoefficientPredictor:
    sizes = [sizes_for(method, conv.in_channels, conv.out_channels, conv.kernel_size, conv.groups) for conv in convs]
    weight: Tensor = convs[0].weight
    predictor = CoefficientPredictor(in_channels, sizes, method, generator=generator, dtype=weight.dtype)
    return predictor.to(weight.device)


def _dynamic(
    conv: nn.Module, method: Method, fill: _Expansion, predictor: CoefficientPredictor | None, number: int
) -> DynamicConv:
    kind = next(cls for static, cls in DYNAMIC_OF.items() if isinstance(conv, static))
    dynamic = kind.from_conv(
        conv,
        method,
        weight=fill(static_weight(conv), 2 * number, conv.weight.requires_grad),
        bias=None if conv.bias is None else fill(conv.bias.detach(), 2 * number + 1, conv.bias.requires_grad),
        padding=static_padding(conv),
        coefficient_predictor=predictor,
    )
    return cast(DynamicConv, hand_over(conv, dynamic))


def replace_everywhere(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules in the place of old ones, under every name that they have; the model, or what replaces it."""
    for parent in list(model.modules()):
        children = child_table(parent)
        for name, child in children.items():
            if child in replacements:
                children[name] = replacements[child]
    return replacements.get(model, model)


def hand_over(old: nn.Module, new: nn.Module, but: Collection[str] = ()) -> nn.Module:
    """Put onto `new` the hooks, the train/eval switch and whatever else the user has put on `old`; return it."""
    own = vars(nn.Module()).keys() | vars(new).keys() | set(but)
    vars(new).update({name: value for name, value in vars(old).items() if name not in own or "hook" in name})
    return set_mode(new, old.training)


def set_mode(module: nn.Module, training: bool) -> nn.Module:
    """Switch a module and all in it to training or eval mode, whatever their own `train` does or returns."""
    for each in module.modules():
        each.training = training
    return module
