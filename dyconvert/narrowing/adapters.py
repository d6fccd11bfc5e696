"""What torch-pruning 1.6 doesn't follow, or follows wrongly: padded channels, reshapes, splits.

- A reshape that takes channels apart, as ShuffleNet's channel shuffle does, breaks its guess of how many channels
  there are (ZeroDivisionError), and so do splits. They are traced as elementwise operators, and groups that pass
  through them keep their channels, as those do that pass through any operator not known to leave channels alone.
- `F.pad` over channels, the CIFAR ResNets' shortcut, couples channel i with channel i + before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Backward nodes of operators that treat every channel by itself and keep the channels' order. What is left when
# "Backward0" is taken away.
_CHANNELWISE = {
    *("Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Pow", "Sqrt", "Rsqrt", "Exp", "Log", "Abs", "Clamp", "ClampMin"),
    *(
        "Relu",
        "Hardtanh",
        "Hardswish",
        "Hardsigmoid",
        "Sigmoid",
        "Tanh",
        "Silu",
        "Gelu",
        "LeakyRelu",
        "Elu",
        "Softplus",
    ),
    *("Mish", "PreluKernel", "NativeDropout", "Mean", "Amax", "Sum", "LinalgVectorNorm"),
    *("MaxPool2DWithIndices", "AvgPool2D", "AdaptiveAvgPool2D", "AdaptiveMaxPool2D", "MkldnnAdaptiveAvgPool2D"),
    *("MaxPool3DWithIndices", "AvgPool3D", "AdaptiveAvgPool3D", "AdaptiveMaxPool3D", "MaxPool2D"),
    *("AvgPool1D", "AdaptiveAvgPool1D", "MaxPool1D"),
    *("UpsampleBilinear2D", "UpsampleNearest2D", "UpsampleBicubic2D", "UpsampleBilinear2DAa", "UpsampleNearest1D"),
    *("UpsampleNearest3D", "UpsampleTrilinear3D", "UpsampleLinear1D"),
    *("ConstantPadNd", "ReflectionPad2D", "ReplicationPad2D", "ReflectionPad1D", "ReplicationPad1D"),
    *("Cat", "Clone", "ToCopy", "T", "Permute", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Alias", "Copy"),
    *("View", "UnsafeView", "ReshapeAlias", "AsStrided", "Slice"),
    *("Convolution", "Addmm", "Mm", "NativeBatchNorm", "NativeLayerNorm", "NativeGroupNorm", "CudnnBatchNorm"),
    *("CudnnConvolution", "MkldnnConvolution"),
}


@dataclass
class Padding:
    """Zero channels that a shortcut adds, before and after those that it reads."""

    before: int
    after: int


def tracing_graph(torch_pruning: Any, training: bool = False) -> Any:
    """torch-pruning's dependency graph, without its guesses about reshapes that take channels apart.

    Args:
        training: trace the forward of training mode; it would always be eval mode's.
    """
    from torch_pruning import ops

    class Graph(torch_pruning.DependencyGraph):
        def _trace(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            model.train(training)
            model.eval = lambda: model  # it would switch to eval mode
            try:
                nodes = super()._trace(model, *args, **kwargs)
            finally:
                del model.eval
            for node in nodes.values():
                taken_apart = node.type == ops.OPTYPE.RESHAPE and not _is_flatten(node.grad_fn, self)
                if taken_apart or node.type in (ops.OPTYPE.SPLIT, ops.OPTYPE.UNBIND):
                    node.type = ops.OPTYPE.ELEMENTWISE
            return nodes

    return Graph()


def _operator(grad_fn: Any) -> str:
    """`Relu` for ReluBackward0."""
    return grad_fn.name().rpartition(".")[2].rstrip("0123456789").removesuffix("Backward")


def _sizes(grad_fn: Any) -> tuple[int, ...]:
    return tuple(getattr(grad_fn, "_saved_self_sym_sizes", getattr(grad_fn, "_saved_self_sizes", ())))


def _spatial(graph: Any) -> int:
    kernels = [len(m.kernel_size) for m in graph.model.modules() if hasattr(m, "kernel_size") and hasattr(m, "groups")]
    return max(kernels, default=2)


def _is_flatten(grad_fn: Any, graph: Any) -> bool:
    return len(_sizes(grad_fn)) in (2, _spatial(graph) + 2)


def obstacle(node: Any, graph: Any) -> str | None:
    """Why the channels that pass through this node can't be narrowed, or None if they can."""
    from torch_pruning import ops

    if node.type in (ops.OPTYPE.MHA, ops.OPTYPE.LSTM, ops.OPTYPE.EMBED):
        return f"they pass through {type(node.module).__name__}"
    # A module's own operators are torch-pruning's to know; others are named after their grad_fn.
    own = type(node.module).__module__.startswith("torch_pruning") and node.type is not ops.OPTYPE.OUTPUT
    if not own or node.grad_fn is None or not hasattr(node.grad_fn, "name"):
        return None
    operator = _operator(node.grad_fn)
    if operator in ("Split", "SplitWithSizes", "Unbind"):
        return "they are split into parts (split, chunk)"
    if operator not in _CHANNELWISE:
        return f"they pass through the operator {operator}, which may mix channels"
    if operator in ("View", "UnsafeView", "ReshapeAlias") and not _is_flatten(node.grad_fn, graph):
        return "they are reshaped, as by a channel shuffle"
    if operator == "Slice" and node.grad_fn._saved_dim == 1:
        return "they are sliced"
    if operator == "ConstantPadNd" and _padded(node.grad_fn) and not hasattr(node, "dyconvert_padding"):
        return "they are padded by constant_pad_nd, which no module of its own calls"
    return None


def _padded(grad_fn: Any) -> tuple[int, int] | None:
    """Zero channels before and after, if any: of `[N, C, H, W]`, the third pair of the padding."""
    padding = list(grad_fn._saved_pad)
    pair = padding[4:6] if len(padding) >= 6 else [0, 0]
    return (pair[0], pair[1]) if any(pair) else None


class _Shift:
    """Channel i of a shortcut's input is channel i + before of its output."""

    def __init__(self, before: int, size: int, back: bool) -> None:
        self.before, self.size, self.back = before, size, back

    def __call__(self, channels: list[Any]) -> list[Any]:
        by = -self.before if self.back else self.before
        moved = [type(c)(idx=c.idx + by, root_idx=c.root_idx) for c in channels]
        return [c for c in moved if not self.back or 0 <= c.idx < self.size]


def follow_padding(graph: Any, owner: Callable[[Any, int, int], str | None]) -> None:
    """Couple what a channel-padding shortcut reads with what it returns.

    Args:
        owner: gives the name of the module that pads, by its grad_fn and by how many channels, or None.
    """
    from torch_pruning.dependency import shape_infer

    for node in graph.module2node.values():
        if node.grad_fn is None or not hasattr(node.grad_fn, "name") or _operator(node.grad_fn) != "ConstantPadNd":
            continue
        if (pair := _padded(node.grad_fn)) is None or (name := owner(node.grad_fn, *pair)) is None:
            continue
        node.dyconvert_padding = name
        for before in node.inputs:
            size = shape_infer.infer_out_channels_recursively(graph, before, [0])
            for dependency in (*node.dependencies, *before.dependencies):
                if dependency.source is node and dependency.target is before:
                    dependency.index_mapping[1] = _Shift(pair[0], size, back=True)
                elif dependency.source is before and dependency.target is node:
                    dependency.index_mapping[1] = _Shift(pair[0], size, back=False)
