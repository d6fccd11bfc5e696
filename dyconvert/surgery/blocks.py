"""Finds the convs and the blocks of a model, and makes the plan."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from dyconvert.copying import on_meta
from dyconvert.errors import ModelError, PlanError, some
from dyconvert.methods import Method
from dyconvert.names import matching, within
from dyconvert.nn import DynamicConv
from dyconvert.surgery.adapters import is_conv, unsupported
from dyconvert.surgery.observe import Call, Observation, observe
from dyconvert.surgery.plan import Plan, PlannedBlock, PlannedConv
from dyconvert.surgery.trace import BlockTrace, Untraceable, trace_block

STEM = "the stem, which reads the image"
SEES_1X1 = "sees 1x1 maps, which are pooled already"


def check_convertible(model: nn.Module) -> None:
    """Refuse what can't be converted as a whole.

    Raises:
        ModelError: not a module, wrapped, compiled, scripted, lazy, already converted, or without convs.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"A torch.nn.Module is needed, not {type(model).__name__}. Pass the model itself.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ModelError(f"The model is wrapped in {type(model).__name__}. Convert model.module, and wrap the result.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("The model is scripted, its Python is gone. Convert it before torch.jit.script.")
    if type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
        raise ModelError("The model is compiled. Convert model._orig_mod, and compile the result.")
    found = 0
    for name, module in model.named_modules():
        if isinstance(module, DynamicConv):
            raise ModelError(
                f"The model is already converted: {name or 'it'} is a {type(module).__name__}. "
                "Start from the static model."
            )
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise ModelError(
                f"{name or 'The model'} is lazy and has no weights yet. Run a batch through the model first."
            )
        found += is_conv(module)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no convs (Conv1d, Conv2d, Conv3d), so there is nothing to convert."
        )


def find(
    model: nn.Module,
    method: Method,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    include_stem: bool = False,
    strict: bool = False,
    example: Any = None,
) -> tuple[Plan, dict[str, BlockTrace]]:
    """Plan a conversion, and hand on the traces of the blocks that share a predictor.

    A **block** is the innermost module, not a container, that holds at least two convs to be converted: what
    one would name by hand, as `Bottleneck` or `InvertedResidual`.
    """
    check_convertible(model)
    convs = {name: m for name, m in model.named_modules() if is_conv(m)}
    observed = observe(model, convs.keys() | _candidates(model, list(convs)).keys(), example)
    plan = Plan(model=type(model).__name__, method=method, convs=[_entry(n, c) for n, c in convs.items()])
    if observed is None:
        plan.warnings.append(
            "No input was given and none of the common sizes fits, so convs that see 1x1 maps weren't found. "
            "Pass an example input."
        )
    stems = find_stems(convs, observed)
    _skip(plan, model, convs, observed, include, exclude, set() if include_stem else stems)
    if method.scope != "block":
        return plan, {}
    traces, failures = _share(plan, model, observed, stems)
    if strict and failures:
        listed = some([f"{block or 'the model'} ({why})" for block, why in failures.items()], 3)
        raise PlanError(
            f"{listed} can't share a predictor. Without strict, their convs get one each; exclude leaves them out."
        )
    return plan, traces


def _entry(name: str, conv: nn.Module) -> PlannedConv:
    return PlannedConv(
        name=name,
        kind=type(conv).__name__,
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=tuple(conv.kernel_size),
        groups=conv.groups,
    )


def _skip(
    plan: Plan,
    model: nn.Module,
    convs: dict[str, nn.Module],
    observed: Observation | None,
    include: Sequence[str],
    exclude: Sequence[str],
    stems: set[str],
) -> None:
    names = list(convs)
    included = set(matching(include, names)) if include else set(names)
    excluded = set(matching(exclude, names)) if exclude else set()
    ties = _tied(model)
    for entry in plan.convs:
        conv = convs[entry.name]
        calls = observed.calls.get(entry.name, []) if observed else []
        sizes = [size for call in calls if (size := _map_size(call, len(entry.kernel_size))) is not None]
        entry.map_size = max(sizes, default=None)
        if (reason := unsupported(conv)) or (reason := ties.get(id(conv.weight))):
            entry.skip(reason)
        elif entry.name in excluded:
            entry.skip("excluded by a pattern")
        elif entry.name not in included:
            entry.skip("not among those included by a pattern")
        elif entry.name in stems:
            entry.skip(STEM)
        elif sizes and all(max(size) == 1 for size in sizes):
            entry.skip(SEES_1X1)


def _tied(model: nn.Module) -> dict[int, str]:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return {
        key: f"its weight is tied: {names[0]} and {names[1]} hold the same parameter"
        for key, names in owners.items()
        if len(names) > 1
    }


def _map_size(call: Call, dims: int) -> tuple[int, ...] | None:
    values = [*call.args, *call.kwargs.values()]
    if not values or not isinstance(values[0], torch.Tensor) or values[0].dim() != dims + 2:
        return None
    return tuple(int(s) for s in values[0].shape[2:])


def find_stems(convs: dict[str, nn.Module], observed: Observation | None) -> set[str]:
    """The convs that read the image: the first to be called, and others that read as few channels.

    A model whose input has more than four channels reads feature maps, and has no stem.
    """
    if observed is None:
        first = next(iter(convs.values()))
        channels = first.in_channels
        order = list(convs)
    else:
        channels = observed.image_channels or 0
        order = [name for name in observed.order if name in convs]
    if not order or not 1 <= channels <= 4:
        return set()
    return {order[0]} | {name for name in order if convs[name].in_channels == channels}


def _is_container(module: nn.Module) -> bool:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return True
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def innermost_blocks(model: nn.Module, names: Sequence[str]) -> dict[str, list[str]]:
    """Each block's name, and those of `names` that stand in it."""
    candidates = _candidates(model, names)
    return {
        name: held
        for name, held in candidates.items()
        if not any(other != name and (other.startswith(name + ".") or name == "") for other in candidates)
    }


def _candidates(model: nn.Module, names: Sequence[str]) -> dict[str, list[str]]:
    """The modules that hold at least two of `names`, and are no containers."""
    inside: dict[str, list[str]] = {}
    for name in names:
        parent = name
        while parent:
            parent = parent.rpartition(".")[0]
            inside.setdefault(parent, []).append(name)
    return {
        parent: held
        for parent, held in inside.items()
        if len(held) >= 2 and not _is_container(model.get_submodule(parent))
    }


def _share(
    plan: Plan, model: nn.Module, observed: Observation | None, stems: set[str]
) -> tuple[dict[str, BlockTrace], dict[str, str]]:
    """Settle for every block whether its convs share a predictor: the traces of those, why not of the others."""
    bare = on_meta(model)
    names = [conv.name for conv in plan.converted]
    several = _with_several_names(model)
    traces, failures = {}, {}
    for block, held in innermost_blocks(model, names).items():
        kind = type(model.get_submodule(block)).__name__
        if any(block == "" or stem.startswith(block + ".") for stem in stems):
            for name in held:
                plan[name].note = f"in no block but {kind}, which reads the image"
            continue
        try:
            if shared := [name for name in held if name in several]:
                raise Untraceable(f"{shared[0]} has several names")
            module = bare.get_submodule(block)
            calls = observed.calls.get(block, []) if observed else []
            _check_called_within(block, held, observed)
            inner = {within(block, name): bare.get_submodule(name) for name in held}
            trace = trace_block(module, inner, calls)
        except Untraceable as why:
            failures[block] = f"{kind}: {why}"
            for name in held:
                plan[name].note = failures[block]
        else:
            traces[block] = trace
            plan.blocks.append(
                PlannedBlock(name=block, reads=trace.reads, in_channels=trace.in_channels, given=list(trace.given))
            )
            for name in held:
                plan[name].block = block
    return traces, failures


def _with_several_names(model: nn.Module) -> set[str]:
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _check_called_within(block: str, held: Sequence[str], observed: Observation | None) -> None:
    """A conv that is also called from outside its block's forward can't get the block's coefficients."""
    if observed is None:
        return
    for name in held:
        if any(block not in call.within for call in observed.calls.get(name, [])):
            raise Untraceable(f"{name} is called from outside of the block's forward")
