"""Every use of torch-pruning, much of it private: one function a use. tests/test_torch_pruning.py calls each.

pyproject.toml bounds its version for that reason. What it doesn't follow, or follows wrongly, is mended by
:mod:`dyconvert.narrowing.obstacles`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from dyconvert.errors import DyconvertError
from dyconvert.installation import install_command
from dyconvert.outputs import tensors_in

# Nodes of its graph, and the graph itself, are its own classes.
Node = Any
DependencyGraph = Any


class Coupled(NamedTuple):
    """What goes along with some channels in one place.

    Attributes:
        node: that place.
        side: "out", its outputs, or "in", its inputs.
        channels: numbers of the channels there.
        roots: which of the channels that were asked about each of them goes along with. A channel that goes along with
            several of them stands there several times.
    """

    node: Node
    side: str
    channels: list[int]
    roots: list[int]


def dependency_graph(
    model: nn.Module,
    arguments: tuple[Any, ...],
    training: bool,
    mend: Callable[[list[Node]], None],
    returned: list[Tensor],
) -> DependencyGraph:
    """Trace a forward, by its autograd graph, into torch-pruning's dependency graph.

    Args:
        training: trace the forward of training mode; it would always be eval mode's.
        mend: is given the nodes before dependencies are made of them: :func:`treat_as_elementwise`, :func:`part`.
        returned: what hooks put there in the forward is followed back as if the model returned it.

    Raises:
        DyconvertError: torch-pruning isn't installed.
    """
    try:
        import torch_pruning
    except ImportError:
        raise DyconvertError(f"Narrowing needs torch-pruning. Run `{install_command('narrow')}`.") from None

    class Graph(torch_pruning.DependencyGraph):  # type: ignore[misc]  # torch-pruning has no types
        def _trace(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            model.train(training)
            model.eval = lambda: model  # it would switch to eval mode
            try:
                nodes = super()._trace(model, *args, **kwargs)
            finally:
                del model.eval
            mend(list(nodes.values()))
            return nodes

    def run(model: nn.Module, args: tuple[Any, ...]) -> Any:
        returned.clear()
        return model(*args)

    def followed(output: Any) -> list[Tensor]:
        """The outputs that depend on weights."""
        return [t for t in (*(t for _, t in tensors_in(output)), *returned) if t.grad_fn is not None]

    return Graph().build_dependency(
        model, example_inputs=arguments, forward_fn=run, output_transform=followed, verbose=False
    )


def nodes(graph: DependencyGraph) -> list[Node]:
    """All places that it knows: modules, parameters in none that it knows, operators."""
    return list(graph.module2node.values())


def kind(node: Node) -> str:
    """What a node is to torch-pruning: "CONV", "RESHAPE", "SPLIT", "UNBIND", "OUTPUT", "MHA", ..."""
    return node.type.name


def treat_as_elementwise(node: Node) -> None:
    """Let a node, which is being traced, pass channels on unchanged: torch-pruning guesses nothing about it."""
    from torch_pruning import ops

    node.type = ops.OPTYPE.ELEMENTWISE


def part(source: Node, reader: Node) -> None:
    """Take away the edge between two nodes, which are being traced: their channels aren't the same."""
    reader.inputs = [node for node in reader.inputs if node is not source]
    source.outputs = [node for node in source.outputs if node is not reader]


def is_operator(node: Node) -> bool:
    """Whether a node stands for an operator of a forward, and for no module or parameter."""
    return type(node.module).__module__.startswith("torch_pruning")


def is_output(node: Node) -> bool:
    """Whether a node stands for what the model returns."""
    return type(node.module).__name__ == "_OutputOp"


def parameter_dims(graph: DependencyGraph) -> dict[int, int]:
    """The dimension that holds the channels of each parameter in no module that it knows, by the parameter's id."""
    return {id(parameter): dim for parameter, dim in graph.unwrapped_parameters}


def cutter(graph: DependencyGraph, module: Any) -> Any:
    """What removes channels from a module: `get_out_channels`, `prune_out_channels(module, numbers)`, and for "in"."""
    return graph.get_pruner_of_module(module)


class _Followed(NamedTuple):
    """A channel in one place, and the one that it goes along with, by the names that torch-pruning's mappings use."""

    idx: int
    root_idx: int


class Endless(Exception):
    """Ever more channels are coupled: reshapes on a way around don't fit together."""


def coupled(graph: DependencyGraph, module: nn.Module, channels: list[int]) -> Iterator[Coupled]:
    """All that goes along with output channels of a module, itself first.

    torch-pruning's own search compares each list of channels with all lists that it found before: it doesn't end in an
    hour where channels go through many concatenations, as in ReXNet. This one follows a channel through a place once.

    Raises:
        Endless: there is no end of it.
    """
    from torch_pruning.dependency import index_mapping

    index_mapping.update_index_mapping(graph)
    edges = sum(len(node.dependencies) for node in nodes(graph))
    # The largest group of DenseNet-121 and ResNet50 takes a third of a million.
    left = max(4 * edges * len(channels), 1_000_000)
    node, cut = graph.module2node[module], cutter(graph, module).prune_out_channels
    pairs = dict.fromkeys(_Followed(channel, channel) for channel in channels)
    places = {(node, cut): pairs}
    waiting = [(node, cut, list(pairs))]
    while waiting:
        node, cut, pending = waiting.pop()
        for dependency in node.dependencies:
            if not dependency.is_triggered_by(cut):
                continue
            there = pending
            for mapping in dependency.index_mapping:
                there = there if mapping is None else mapping(there)
            left -= len(there)
            if left < 0:
                raise Endless
            place = places.setdefault((dependency.target, dependency.handler), {})
            # Some mappings return sets, in any order. What goes along with several channels is placed by the first.
            new = sorted({pair for pair in there if pair not in place}, key=lambda pair: (pair.root_idx, pair.idx))
            if new:
                place.update(dict.fromkeys(new))
                waiting.append((dependency.target, dependency.handler, new))
    for (node, cut), found in places.items():
        if found:
            side = "out" if graph.is_out_channel_pruning_fn(cut) else "in"
            yield Coupled(node, side, [pair.idx for pair in found], [pair.root_idx for pair in found])


def channels_out(graph: DependencyGraph, node: Node) -> int | None:
    """How many channels a node returns."""
    from torch_pruning.dependency import shape_infer

    return shape_infer.infer_out_channels_recursively(graph, node, [0])


def shift_channels(node: Node, source: Node, before: int, size: int) -> None:
    """Channel i of `source`, which has `size`, is channel i + before of `node`, which reads it."""
    for dependency in (*node.dependencies, *source.dependencies):
        if dependency.source is node and dependency.target is source:
            dependency.index_mapping[1] = _Shift(before, size, back=True)
        elif dependency.source is source and dependency.target is node:
            dependency.index_mapping[1] = _Shift(before, size, back=False)


class _Shift:
    def __init__(self, before: int, size: int, back: bool) -> None:
        self.before, self.size, self.back = before, size, back

    def __call__(self, channels: list[Any]) -> list[Any]:
        by = -self.before if self.back else self.before
        moved = [type(c)(idx=c.idx + by, root_idx=c.root_idx) for c in channels]
        return [c for c in moved if not self.back or 0 <= c.idx < self.size]
