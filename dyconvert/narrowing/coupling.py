"""Which channels have to be narrowed together, from torch-pruning's dependency graph.

What torch-pruning doesn't follow is in :mod:`dyconvert.narrowing.obstacles`.
"""

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.errors import PlanError
from dyconvert.narrowing import torch_pruning_bridge as bridge
from dyconvert.narrowing.flow import is_layer
from dyconvert.narrowing.graph import Graph, Group, Member, check_free
from dyconvert.narrowing.tracing import Traced, Watch, trace
from dyconvert.torch_internals.modules import ConvNd

STEM = "the stem"
OUTPUT = "the model's output"
UNLIKE = "some of its channels go along with more others than the rest"
ENDLESS = "they are reshaped in ways that don't fit together"
SINGLE = "a single channel"


def channel_groups(model: nn.Module, example: tuple[Any, ...], keep: Sequence[str] = ()) -> Graph:
    """Find the coupled groups of a static model, which is left as it is.

    Args:
        example: the arguments of the forward.
        keep: shell patterns over the names of modules whose output channels stay as they are.

    Raises:
        ModelError: the model rejects the example, or not one group can be narrowed.
        PlanError: a pattern matches nothing.
    """
    traced = trace(model, example)
    groups, cutters = _groups(traced)
    _check_disjoint(groups)
    _keep(groups, keep, [name for name, _ in model.named_modules() if name], traced.watch)
    graph = Graph(groups, traced.watch.layers, traced.watch.paddings, cutters)
    check_free(model, graph)
    return graph


def _groups(traced: Traced) -> tuple[list[Group], dict[str, Any]]:
    names = {id(m): name for name, m in traced.runner.named_modules()}
    parameters = {id(p): name for name, p in traced.runner.named_parameters()}
    by_name = {names[id(node.module)]: node for node in bridge.nodes(traced.graph) if id(node.module) in names}
    covered: dict[str, set[int]] = {}
    groups, cutters = [], dict[str, Any]()
    for name in traced.watch.layers:
        if name not in by_name:
            continue  # nothing that the model returns, or throws away, leads back to it
        module = by_name[name].module
        size = bridge.cutter(traced.graph, module).get_out_channels(module)
        rest = sorted(set(range(size)) - covered.get(name, set()))
        if rest:
            groups.append(_group(traced, names, parameters, name, module, rest, covered, cutters))
    return groups, cutters


def _group(
    traced: Traced,
    names: dict[int, str],
    parameters: dict[int, str],
    name: str,
    module: nn.Module,
    rest: list[int],
    covered: dict[str, set[int]],
    cutters: dict[str, Any],
) -> Group:
    """The group of the channels `rest` of a module; notes which channels of which modules it covers."""
    dims = bridge.parameter_dims(traced.graph)
    place = {channel: position for position, channel in enumerate(rest)}
    members, reason, misfit = [], None, None
    unit = torch.arange(len(rest))
    try:
        coupled = list(bridge.coupled(traced.graph, module, rest))
    except bridge.Endless:
        covered.setdefault(name, set()).update(rest)
        cutters[name] = bridge.cutter(traced.graph, module)
        return Group(name, len(rest), [Member(name, "out", torch.tensor(rest), unit)], unit, ENDLESS)
    for node, side, numbers, roots in coupled:
        target = node.module
        if reason is None and (reason := traced.obstacles.of(node, max(numbers) + 1)) and id(target) in names:
            reason = f"{names[id(target)]}: {reason}"
        channels, positions, unit = _once(torch.tensor(numbers), torch.tensor([place[r] for r in roots]), unit)
        if id(target) in parameters:
            member = Member(parameters[id(target)], "parameter", channels, positions, dims[id(target)])
        elif id(target) in names:
            member = Member(names[id(target)], side, channels, positions)
            cutter = cutters[member.name] = bridge.cutter(traced.graph, target)
            if is_layer(target) and max(numbers) >= (getattr(cutter, f"get_{side}_channels")(target) or 0):
                # A conv along the channels, as in efficient channel attention: they are its pixels.
                misfit = f"{member.name} reads or makes them along another dimension"
            if side == "out":
                covered.setdefault(member.name, set()).update(numbers)
                if not node.outputs:
                    reason = reason or OUTPUT
            unit = _tie(unit, target, side, channels, positions)
        elif padded := getattr(node, "dyconvert_padding", None):
            member = Member(padded, "padding", channels, positions)
        else:
            reason = reason or (OUTPUT if bridge.is_output(node) else None)
            continue
        members.append(member)
    reason = reason or misfit
    group = Group(name, len(rest), members, unit, reason)
    if group.kept is None and group.units == 1:
        grouped = next((m.name for m in members if getattr(traced.runner.get_submodule(m.name), "groups", 1) > 1), None)
        group.kept = SINGLE if len(rest) == 1 or grouped is None else f"{grouped}: its groups tie all channels together"
    if group.kept is None and not _alike(group):
        group.kept = UNLIKE
    return group


def _alike(group: Group) -> bool:
    """Whether one unit can represent another: they have as many channels, and those are in the same places."""
    sizes = group.unit.bincount()
    if sizes.min() != sizes.max():
        return False
    by_unit = group.unit.argsort(stable=True)
    counts = (m.positions.bincount(minlength=group.size)[by_unit].view(group.units, -1) for m in group.members)
    return all(bool((rows == rows[0]).all()) for rows in counts)


def _once(channels: Tensor, positions: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each channel with its first position; and units that hold all positions of a channel, as of `cat([a, a])`.

    Args:
        channels: `[K]`, with repetitions.
        positions: `[K]`, the places in the group.
        unit: `[size]`, the group's units.
    """
    first: dict[int, int] = {}
    for channel, position in zip(channels.tolist(), positions.tolist(), strict=True):
        other = first.setdefault(channel, position)
        if other != position and unit[other] != unit[position]:
            unit = torch.where(unit == unit[position], unit[other], unit)
    if len(first) == len(channels):
        return channels, positions, unit
    unit = unit.unique(return_inverse=True)[1]
    return torch.tensor(list(first)), torch.tensor(list(first.values())), unit


def _tie(unit: Tensor, module: nn.Module, side: str, channels: Tensor, positions: Tensor) -> Tensor:
    """Units in which a grouped conv or a group norm keeps the same places in each of its groups."""
    groups = getattr(module, "groups", getattr(module, "num_groups", 1)) or 1
    whole = getattr(module, "out_channels" if side == "out" else "in_channels", getattr(module, "num_channels", 0))
    depthwise = isinstance(module, ConvNd) and module.groups == module.out_channels == module.in_channels
    if groups == 1 or depthwise or not whole:
        return unit
    local = channels % (whole // groups)
    for place in local.unique():
        tied = unit[positions[local == place]]
        unit = torch.where(torch.isin(unit, tied), tied.min(), unit)
    return unit.unique(return_inverse=True)[1]


def _check_disjoint(groups: list[Group]) -> None:
    """A channel that two groups claim is coupled in a way that wasn't resolved: neither is narrowed."""
    owners: dict[tuple[str, str, int], Group] = {}
    for group in groups:
        for member in group.members:
            for channel in member.channels.tolist():
                other = owners.setdefault((member.name, member.side, channel), group)
                if other is not group:
                    for each in (group, other):
                        each.kept = each.kept or f"coupled in several ways at {member.name}"


def _keep(groups: list[Group], patterns: Sequence[str], names: list[str], watch: Watch) -> None:
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise PlanError(f"No module's name matches {pattern!r}. Names look like {', '.join(names[:3])}.")
    for group in groups:
        makers = {m.name for m in group.makers if m.name in watch.layers and m.name not in watch.small}
        if group.kept is None and any(_matches(m.name, pattern) for m in group.makers for pattern in patterns):
            group.kept = "kept by a pattern"
        # A squeeze-excite or depthwise conv on the stem's output doesn't add another source of channels.
        others = {name for name in makers - watch.stems if not watch.layers[name].depthwise}
        if group.kept is None and makers & watch.stems and not others:
            group.kept = STEM


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern + ".*")
