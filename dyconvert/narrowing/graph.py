"""Which channels have to be narrowed together: coupled groups, from torch-pruning's dependency graph.

A group is a set of channels that are the same channels in several layers: those of a conv, of its batch norm and of
the convs that read them; of all layers that add to one residual stream; of a depthwise conv on both sides. What
torch-pruning doesn't follow is in :mod:`dyconvert.narrowing.obstacles`.
"""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.copying import clear_hooks, on_meta, skeleton
from dyconvert.errors import DyconvertError, ModelError, PlanError, brief, some
from dyconvert.narrowing import torch_pruning_bridge as bridge
from dyconvert.narrowing.flow import is_layer
from dyconvert.narrowing.obstacles import Obstacles, Padding, follow_padding
from dyconvert.torch_internals.modules import ConvNd
from dyconvert.torch_internals.trees import tree_flatten, tree_map_only

STEM = "the stem"
OUTPUT = "the model's output"
UNLIKE = "some of its channels go along with more others than the rest"
ENDLESS = "they are reshaped in ways that don't fit together"
SINGLE = "a single channel"


@dataclass
class Member:
    """A group's channels in one place.

    Attributes:
        name: of the module, or of the parameter that belongs to none.
        side: "out": the module's outputs (and inputs, where they are the same channels: batch norm, depthwise
            conv); "in": its inputs; "parameter": a parameter of its own, along `dim`; "padding": what a shortcut
            that pads channels returns.
        channels: `[m]`, numbers of the channels there.
        positions: `[m]`, which of the group's channels each of them is.
    """

    name: str
    side: str
    channels: Tensor
    positions: Tensor
    dim: int = 0

    def order(self, size: int) -> Tensor | None:
        """`[size]`: its channels in the order of the group's; None where it hasn't just one for each of them."""
        if len(self.positions) != size or len(self.positions.unique()) != size:
            return None
        return self.channels[self.positions.argsort()]


@dataclass
class Group:
    """Channels that are narrowed together.

    Attributes:
        name: the first module that makes them.
        size: how many there are.
        members: where they are.
        unit: `[size]`: which unit each channel is of. A unit is kept or dropped as a whole: one channel as a rule;
            before and behind a grouped conv, the channels of the same place in each of its groups.
        kept: why they are all kept, or None.
    """

    name: str
    size: int
    members: list[Member]
    unit: Tensor
    kept: str | None = None

    @property
    def units(self) -> int:
        return int(self.unit.max()) + 1

    @property
    def makers(self) -> list[Member]:
        return [member for member in self.members if member.side == "out"]


@dataclass
class Layer:
    """A conv or linear, as it was seen in a trial run.

    Attributes:
        positions: output pixels of one image, of all its calls.
        weights: elements of its weight; times `positions`, its multiply-adds.
    """

    name: str
    positions: int
    weights: int
    depthwise: bool = False


@dataclass
class Graph:
    """The coupled groups of a model, and its layers in the order in which data flows."""

    groups: list[Group]
    layers: dict[str, Layer]
    paddings: dict[str, Padding]
    cutters: dict[str, Any] = field(repr=False)

    @property
    def free(self) -> list[Group]:
        return [group for group in self.groups if group.kept is None]


def channel_groups(model: nn.Module, example: tuple[Any, ...], keep: Sequence[str] = ()) -> Graph:
    """Find the coupled groups of a static model, which is left as it is.

    Args:
        example: the arguments of the forward.
        keep: shell patterns over the names of modules whose output channels stay as they are.

    Raises:
        ModelError: the model rejects the example, or not one group can be narrowed.
        PlanError: a pattern matches nothing.
    """
    try:
        runner, arguments = on_meta(model), tree_map_only(Tensor, _on_meta, example)
        traced = _traced(runner, arguments)
        # Auxiliary heads are part of training only, and read channels that are narrowed.
        layers = {name for name, m in runner.named_modules() if is_layer(m)}
        if (layers - traced.watch.layers.keys()) & _called_in_training(runner, arguments):
            traced = _traced(runner, arguments, training=True)
    except DyconvertError:
        raise
    except (NotImplementedError, RuntimeError):
        # Control flow that looks at values needs a real run.
        runner = skeleton(model, lambda t: t.detach())
        try:
            traced = _traced(runner, example)
        except DyconvertError:
            raise
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} can't be narrowed: {brief(error)}. Pass an example that its forward "
                "takes: `example=...`."
            ) from error
    except Exception as error:
        raise ModelError(f"{type(model).__name__} can't be followed by torch-pruning: {brief(error)}.") from error
    groups, cutters = _groups(traced, runner)
    _check_disjoint(groups)
    _keep(groups, keep, [name for name, _ in model.named_modules() if name], traced.watch)
    graph = Graph(groups, traced.watch.layers, traced.watch.paddings, cutters)
    check_free(model, graph)
    return graph


def check_free(model: nn.Module, graph: Graph) -> None:
    """Refuse a model in which nothing can be narrowed.

    Raises:
        ModelError: it says why.
    """
    if not graph.free:
        reasons = sorted({f"{group.kept}" for group in graph.groups})
        raise ModelError(f"No channels of {type(model).__name__} can be narrowed: {some(reasons)}.")


def keep_unsteady(graph: Graph, names: set[str]) -> None:
    """Keep the channels that layers read or make whose calls can't be recognised from one run to the next."""
    for group in graph.free:
        if unsteady := sorted({member.name for member in group.members} & names):
            group.kept = f"{unsteady[0]} is called otherwise from one run to the next"


def _on_meta(t: Tensor) -> Tensor:
    t = t.detach().to("meta")
    # A batch norm can't be trained on one image.
    return t if t.dim() < 2 or t.shape[0] > 1 else t.expand(2, *t.shape[1:])


def _called_in_training(model: nn.Module, arguments: tuple[Any, ...]) -> set[str]:
    """The layers that a forward in training mode calls; none where it fails, as it may on the meta device."""
    called: set[str] = set()
    handles = [m.register_forward_hook(lambda *_, name=name: called.add(name)) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            model.train()(*arguments)
    except Exception:
        return set()
    finally:
        for handle in handles:
            handle.remove()
        model.eval()
    return called


class _Watch:
    """What hooks see in the run that is traced."""

    def __init__(self, model: nn.Module, image_channels: int, images: int) -> None:
        self.layers: dict[str, Layer] = {}
        self.small: set[str] = set()
        self.paddings: dict[str, Padding] = {}
        self.stems: set[str] = set()
        self._shortcuts: dict[Any, tuple[str, nn.Module]] = {}
        self._image_channels = image_channels
        self._images = images
        self._handles = [m.register_forward_hook(self._hook(name)) for name, m in model.named_modules()]

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            if is_layer(module):
                channels = module.out_channels if isinstance(module, ConvNd) else module.out_features
                positions = output.numel() // (channels * self._images)
                depthwise = isinstance(module, ConvNd) and module.groups == module.in_channels == module.out_channels
                layer = self.layers.setdefault(name, Layer(name, 0, module.weight.numel(), depthwise))
                layer.positions += positions
                if layer.positions == 1:
                    self.small.add(name)
                if isinstance(module, ConvNd) and module.in_channels == self._image_channels <= 4:
                    self.stems.add(name)
            elif next(module.parameters(), None) is None and output.grad_fn is not None:
                self._shortcuts[output.grad_fn] = name, module

        return hook

    def padding(self, grad_fn: Any, before: int, after: int) -> str | None:
        """Note that a module without parameters pads channels; its name, or None if it is no such module."""
        if grad_fn not in self._shortcuts:
            return None
        name = self._shortcuts[grad_fn][0]
        self.paddings[name] = Padding(before, after)
        return name

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@dataclass
class _Traced:
    """torch-pruning's graph of a run, and what hooks saw of the same run."""

    graph: bridge.DependencyGraph
    watch: _Watch
    obstacles: Obstacles


def _traced(
    runner: nn.Module, arguments: tuple[Any, ...], training: bool = False, unused: Sequence[str] = ()
) -> _Traced:
    """Trace a run.

    Args:
        unused: layers that reach no output: theirs are traced as if the model returned them, for their inputs are
            narrowed with what makes them.
    """
    clear_hooks(runner)
    for p in runner.parameters():
        p.requires_grad_(p.is_floating_point() or p.is_complex())
    tensors = [leaf for leaf in tree_flatten(arguments)[0] if isinstance(leaf, Tensor)]
    listed = bool(arguments) and isinstance(arguments[0], list)
    images = len(arguments[0]) if listed else len(tensors[0]) if tensors and tensors[0].dim() else 1
    channels = tensors[0].shape[0 if listed else 1] if tensors and tensors[0].dim() > 2 else 0
    watch = _Watch(runner, channels, max(images, 1))
    obstacles = Obstacles(runner)
    returned: list[Tensor] = []
    handles = [runner.get_submodule(name).register_forward_hook(_keeper(returned)) for name in unused]
    try:
        with torch.enable_grad():
            graph = bridge.dependency_graph(runner, arguments, training, obstacles.mend, returned)
    finally:
        watch.remove()
        for handle in handles:
            handle.remove()
    followed = {id(node.module) for node in bridge.nodes(graph)}
    rest = [name for name in watch.layers if id(runner.get_submodule(name)) not in followed]
    if rest and not unused:
        return _traced(runner, arguments, training, rest)
    follow_padding(graph, obstacles, watch.padding)
    return _Traced(graph, watch, obstacles)


def _keeper(returned: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            returned.append(output)

    return hook


def _groups(traced: _Traced, runner: nn.Module) -> tuple[list[Group], dict[str, Any]]:
    names = {id(m): name for name, m in runner.named_modules()}
    by_name = {names[id(node.module)]: node for node in bridge.nodes(traced.graph) if id(node.module) in names}
    covered: dict[str, set[int]] = {}
    groups, cutters = [], dict[str, Any]()
    for name in traced.watch.layers:
        if name not in by_name:
            continue  # it doesn't reach the output
        module = by_name[name].module
        size = bridge.cutter(traced.graph, module).get_out_channels(module)
        rest = sorted(set(range(size)) - covered.get(name, set()))
        if rest:
            groups.append(_group(traced, runner, names, name, module, rest, covered, cutters))
    return groups, cutters


def _group(
    traced: _Traced,
    runner: nn.Module,
    names: dict[int, str],
    name: str,
    module: nn.Module,
    rest: list[int],
    covered: dict[str, set[int]],
    cutters: dict[str, Any],
) -> Group:
    """The group of the channels `rest` of a module; notes which channels of which modules it covers."""
    parameters = {id(p): n for n, p in runner.named_parameters()}
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
    if reason is None and group.units == 1:
        grouped = next((m.name for m in members if getattr(runner.get_submodule(m.name), "groups", 1) > 1), None)
        group.kept = SINGLE if len(rest) == 1 or grouped is None else f"{grouped}: its groups tie all channels together"
    if reason is None and group.kept is None and not _alike(group):
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


def _keep(groups: list[Group], patterns: Sequence[str], names: list[str], watch: _Watch) -> None:
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
