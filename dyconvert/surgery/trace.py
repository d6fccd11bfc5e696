"""FX: a module's graph, in which modules that hold no conv are leaves."""

from typing import Any

from torch import fx, nn


class BlockTracer(fx.Tracer):
    """Goes into the modules `inside` and into no other; those are leaves, as convs and norms are."""

    def __init__(self, inside: set[nn.Module]) -> None:
        super().__init__()
        self.inside = inside

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return module not in self.inside


def graph_of(block: nn.Module, convs: set[nn.Module]) -> fx.Graph:
    """The graph of a block in its present mode; what isn't on the way to one of the `convs` is a leaf.

    Raises:
        Exception: of any kind: the block's forward can't be traced.
    """
    inside = {m for m in block.modules() if m not in convs and any(inner in convs for inner in m.modules())}
    return BlockTracer(inside).trace(block)


def argument_of(node: Any) -> str | None:
    """What a node of a graph is in terms of its forward's arguments, as `x` or `x[0]`; None if it is neither.

    A concatenation of all maps of a list argument is the argument itself.
    """
    if node.op == "placeholder":
        # FX renames a parameter that is called as a builtin: `input` becomes `input_1`, and its target stays.
        return str(node.target).lstrip("*")
    inputs = node.all_input_nodes
    if len(inputs) != 1 or node.op not in ("call_function", "call_method"):
        return None
    source = argument_of(inputs[0])
    if source is None:
        return None
    name = getattr(node.target, "__name__", str(node.target))
    if name == "getitem" and isinstance(node.args[1], (int, str)):
        return f"{source}[{node.args[1]!r}]"
    if name in ("cat", "concat", "concatenate"):
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return source if dim == 1 and node.args and node.args[0] is inputs[0] else None
    return None
