"""plan(model): what becomes of every conv, found out by running the model, which is left as it is."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dyconvert.errors import PlanError, some
from dyconvert.methods import Method
from dyconvert.names import matching
from dyconvert.nn.mixture import Sizes, sizes_for
from dyconvert.surgery.adapters import is_conv, unsupported
from dyconvert.surgery.blocks import candidates, check_convertible, find_stems
from dyconvert.surgery.observe import Observation, observe
from dyconvert.surgery.plan import Plan, PlannedConv
from dyconvert.surgery.recording import NOT_COPIED, Call
from dyconvert.surgery.sharing import Sharing
from dyconvert.surgery.standins import ASKED, told_apart
from dyconvert.torch_internals.modules import parameter_table

STEM = "the stem, which reads the image"
SEES_1X1 = "sees 1x1 maps, which are pooled already"


def make_plan(
    model: nn.Module,
    method: Method,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    include_stem: bool = False,
    strict: bool = False,
    example: Any = None,
) -> Plan:
    """What :func:`~dyconvert.plan` does when its options are read.

    A **block** is the innermost module, not a container, that holds at least two convs to be converted: what
    one would name by hand, as `Bottleneck` or `InvertedResidual`.
    """
    check_convertible(model)
    convs = {name: m for name, m in model.named_modules() if is_conv(m)}
    observed = observe(model, convs.keys() | candidates(model, list(convs)).keys(), example, train=True)
    plan = Plan(model=type(model).__name__, method=method, convs=[_entry(n, c) for n, c in convs.items()])
    if observed is None:
        plan.warnings.append(
            "No input was given and none of the common sizes fits, so what the convs see wasn't found out, and none "
            "of them share a predictor. Pass an example input."
        )
    else:
        plan._example = observed.example if example is None else example
    stems = find_stems(convs, observed)
    _skip(plan, model, convs, observed, include, exclude, set() if include_stem else stems)
    if observed is not None:
        for name in told_apart(model, [conv.name for conv in plan.converted], observed):
            plan[name].skip(ASKED)
    if method.scope == "block":
        failures = Sharing(plan, model, observed, example).settle(stems)
        if strict and failures:
            listed = some([f"{block or 'the model'} ({why})" for block, why in failures.items()], 3)
            raise PlanError(
                f"{listed} can't share a predictor. Without strict, their convs get one each; exclude leaves them out."
            )
    return plan


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
        dims = len(entry.kernel_size)
        inputs = [value for call in calls if isinstance(value := _first(call), Tensor)]
        sizes = [tuple(int(s) for s in value.shape[2:]) for value in inputs if value.dim() == dims + 2]
        entry.map_size = max(sizes, default=None)
        if reason := unsupported(conv) or _tie(conv, ties):
            entry.skip(reason)
        elif observed and NOT_COPIED in (functions := observed.reads.get(entry.name, set())):
            entry.skip(
                "the code holds it by a global, or by an object that isn't copied with the model: a copy of the model "
                "goes on using, and training, the original's"
            )
        elif observed and functions:
            entry.skip(f"its weight or bias is used outside of its own forward ({some(sorted(functions), 3)})")
        elif entry.name in excluded:
            entry.skip("excluded by a pattern")
        elif entry.name not in included:
            entry.skip("not among those included by a pattern")
        elif entry.name in stems:
            entry.skip(STEM)
        elif not _sizes(plan, entry).total:
            entry.skip(f"none of the method's axes says anything about it: {', '.join(plan.method.axes)}")
        elif sizes and all(max(size) == 1 for size in sizes):
            entry.skip(SEES_1X1)
        elif any(value.dim() == dims + 1 for value in inputs):
            entry.skip("it is given a single image without a batch dimension")


def _sizes(plan: Plan, entry: PlannedConv) -> Sizes:
    return sizes_for(plan.method, entry.in_channels, entry.out_channels, entry.kernel_size, entry.groups)


def _tied(model: nn.Module) -> dict[int, str]:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for kind, parameter in parameter_table(module).items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{kind}")
    return {
        key: f"its {names[0].rpartition('.')[2]} is tied: {names[0]} and {names[1]} are the same parameter"
        for key, names in owners.items()
        if len(names) > 1
    }


def _tie(conv: nn.Module, ties: dict[int, str]) -> str | None:
    return next((ties[id(p)] for p in conv.parameters(recurse=False) if id(p) in ties), None)


def _first(call: Call) -> Any:
    return next(iter((*call.args, *call.kwargs.values())), None)
