"""FX: a block's graph, and what in it the block's predictor can read."""

import inspect
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dyconvert.errors import brief
from dyconvert.surgery.observe import Call


class Untraceable(Exception):
    """Why a block's convs can't share a predictor; the plan shows it."""


@dataclass
class BlockTrace:
    """A block's graphs in training and in eval mode, and the map its predictor reads.

    Attributes:
        train, eval: the graphs; the convs are leaves, and so are all modules that hold none of them.
        reads: name of the node that the predictor reads; every conv descends from it.
        in_channels: that map's channels.
        given: the optional inputs of the block's forward that are given; the others keep their defaults.
    """

    train: fx.Graph
    eval: fx.Graph
    reads: str
    in_channels: int
    given: Sequence[str] = ()


class BlockTracer(fx.Tracer):
    """Goes into the modules `inside`, those that hold convs to be converted, and into no other.

    So drop-path, attention and squeeze-excite keep their own Python and their own train/eval switch.
    """

    def __init__(self, inside: set[nn.Module], fixed: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.inside = inside
        self.fixed = fixed or {}

    def proxy(self, node: fx.Node) -> Any:
        # So that `if shortcut is None` is decided as it is when the block is called.
        if node.op == "placeholder" and node.target in self.fixed:
            node.meta["fixed"] = self.fixed[node.target]
            return self.fixed[node.target]
        return super().proxy(node)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return module not in self.inside


def trace_block(
    block: nn.Module,
    convs: Mapping[str, nn.Module],
    calls: Sequence[Call] = (),
    known: tuple[str, int, Sequence[str]] | None = None,
) -> BlockTrace:
    """Trace a block in both modes and find what its predictor can read.

    Args:
        block: a module whose parameters may be on the meta device; its train/eval switch is used.
        convs: the convs to be converted, by their names within the block.
        calls: the observed calls of the block.
        known: the node to read, its channels and the optional inputs that are given, where a plan names them already.

    Raises:
        Untraceable: tracing fails, or no one map feeds all the convs.
    """
    inside = {
        module
        for name, module in block.named_modules()
        if any(conv == name or conv.startswith(name + ".") or name == "" for conv in convs)
    }
    inside -= set(convs.values())
    for module in inside - {block}:
        if module._forward_hooks or module._forward_pre_hooks:
            raise Untraceable(f"{type(module).__name__} inside of the block has hooks, which tracing would lose")
    given = _given(block, calls) if known is None else known[2]
    fixed = {name: p.default for name, p in _optional(block).items() if name not in given}
    if odd := [name for name, value in fixed.items() if not isinstance(value, bool | int | float | str | tuple | None)]:
        raise Untraceable(f"the default of {odd[0]} is an object, which generated code can't name")
    graphs = {}
    for training in (True, False):
        block.train(training)
        graphs[training] = _trace(block, inside, fixed)
        _check_calls(graphs[training], convs)
        for node in graphs[training].nodes:
            if node.op == "placeholder" and node.target not in fixed and not node.users:
                raise Untraceable(f"its forward looks at {node.target} in a way that tracing doesn't see")
    if known is None:
        call = calls[0] if calls else None
        node = _source(graphs[False], convs, call, block)
        known = node.name, _channels(node, block, call), given
    for graph in graphs.values():
        node_named(graph, known[0])
    return BlockTrace(graphs[True], graphs[False], *known)


def _optional(block: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of a block's forward that have a default."""
    parameters = inspect.signature(block.forward).parameters
    return {name: p for name, p in parameters.items() if p.default is not p.empty}


def _given(block: nn.Module, calls: Sequence[Call]) -> list[str]:
    """The optional inputs that every call gives a tensor for; the others have to be left out by every call."""
    given = []
    for name, parameter in _optional(block).items():
        kinds = set()
        for call in calls:
            value = _argument(block, call, name)
            kinds.add(
                "tensor" if isinstance(value, Tensor) else "default" if _is_default(value, parameter) else "other"
            )
        if "other" in kinds or len(kinds) > 1:
            raise Untraceable(f"it is called with different values of {name}, or one that isn't its default")
        if "tensor" in kinds:
            given.append(name)
    return given


def _is_default(value: Any, parameter: inspect.Parameter) -> bool:
    return value is parameter.default or (type(value) is type(parameter.default) and value == parameter.default)


def _trace(block: nn.Module, inside: set[nn.Module], fixed: Mapping[str, Any]) -> fx.Graph:
    before = {module: _attributes(module) for module in inside}
    state = random.getstate(), torch.get_rng_state()
    try:
        graph = BlockTracer(inside, fixed).trace(block)
    except Exception as error:
        raise Untraceable(f"its forward can't be traced ({_sentence(error)})") from error
    finally:
        sets = [name for module in inside for name in _restore(module, before[module])]
        drew = random.getstate() != state[0] or not torch.equal(torch.get_rng_state(), state[1])
        random.setstate(state[0])
        torch.set_rng_state(state[1])
    if sets:
        raise Untraceable(f"its forward sets {sets[0]}, which tracing would lose")
    if drew:
        raise Untraceable("its forward draws random numbers, which tracing would fix")
    if any(node.op == "get_attr" and "_tensor_constant" in str(node.target) for node in graph.nodes):
        raise Untraceable("its forward makes tensors, which tracing would fix")
    return graph


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {**vars(module), "_buffers": dict(module._buffers)}


def _restore(module: nn.Module, before: dict[str, Any]) -> list[str]:
    """Undo what a forward has set on a module; the names of that, but for FX's own constants."""
    now = vars(module)
    new = [name for name in now if name not in before]
    changed = [name for name in before if name != "_buffers" and now.get(name) is not before[name]]
    changed += [name for name, t in module._buffers.items() if t is not before["_buffers"].get(name)]
    for name in new:
        del now[name]
    now.update({name: value for name, value in before.items() if name != "_buffers"})
    module._buffers.clear()
    module._buffers.update(before["_buffers"])
    return [name for name in (*new, *changed) if not name.startswith("_tensor_constant")]


def _sentence(error: Exception) -> str:
    """What went wrong, without what FX's documentation has to say about it."""
    return brief(error).split(". ")[0]


def conv_nodes(graph: fx.Graph, name: str) -> list[fx.Node]:
    """The calls of the module called `name`."""
    return [node for node in graph.nodes if node.op == "call_module" and node.target == name]


def _check_calls(graph: fx.Graph, convs: Mapping[str, nn.Module]) -> None:
    for name in convs:
        calls = conv_nodes(graph, name)
        if len(calls) != 1:
            raise Untraceable(f"{name} is called {len(calls)} times in the block's forward")
        if len(calls[0].args) + len(calls[0].kwargs) != 1:
            raise Untraceable(f"{name} is called with more than its input")


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        for parent in stack.pop().all_input_nodes:
            if parent not in found:
                found.add(parent)
                stack.append(parent)
    return found


def _source(graph: fx.Graph, convs: Mapping[str, nn.Module], call: Call | None, block: nn.Module) -> fx.Node:
    """The one input that all convs descend from, or the first map made of it where it is no map."""
    common = set.intersection(*(_ancestors(conv_nodes(graph, name)[0]) for name in convs))
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node in common]
    if len(inputs) != 1:
        what = "several inputs" if inputs else "no one input"
        raise Untraceable(f"its convs descend from {what} of the block")
    if inputs[0].target.startswith("*"):
        raise Untraceable("its forward takes a variable number of inputs")
    dims = len(next(iter(convs.values())).kernel_size)
    if call is None:
        return inputs[0]
    if _is_map(_argument(block, call, inputs[0].target), dims):
        return inputs[0]
    # A dense layer, say, takes the list of maps that it concatenates.
    values = _node_values(graph, block, call)
    for node in graph.nodes:
        if node in common and _is_map(values.get(node), dims) and inputs[0] in _ancestors(node):
            node.meta["channels"] = values[node].shape[1]
            return node
    raise Untraceable(f"its input is a {type(_argument(block, call, inputs[0].target)).__name__}, not a feature map")


def _is_map(value: Any, dims: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == dims + 2


def _argument(block: nn.Module, call: Call, name: str) -> Any:
    try:
        bound = inspect.signature(block.forward).bind(*call.args, **call.kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    return bound.arguments.get(name)


def _node_values(graph: fx.Graph, block: nn.Module, call: Call) -> dict[fx.Node, Any]:
    interpreter = fx.Interpreter(block, garbage_collect_values=False, graph=graph)
    placeholders = [node.target for node in graph.nodes if node.op == "placeholder"]
    try:
        with torch.no_grad():
            interpreter.run(*(_argument(block, call, name) for name in placeholders), enable_io_processing=False)
    except Exception as error:
        raise Untraceable(f"its graph doesn't run on what the block is given ({_sentence(error)})") from error
    return interpreter.env


def node_named(graph: fx.Graph, name: str) -> fx.Node:
    for node in graph.nodes:
        if node.name == name:
            return node
    raise Untraceable(f"its graph has no node {name!r}")


def _channels(node: fx.Node, block: nn.Module, call: Call | None) -> int:
    if "channels" in node.meta:
        return node.meta["channels"]
    if call is not None and node.op == "placeholder":
        value = _argument(block, call, node.target)
        if isinstance(value, Tensor):
            return value.shape[1]
    for user in node.users:
        module = block.get_submodule(user.target) if user.op == "call_module" else None
        for attribute in ("in_channels", "num_features", "num_channels"):
            if isinstance(getattr(module, attribute, None), int):
                return getattr(module, attribute)
    raise Untraceable("it isn't called in eval mode, so how many channels it reads is unknown")
