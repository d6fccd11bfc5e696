"""Obstacles that torch-pruning doesn't follow, or follows wrongly: padded channels, reshapes, splits, special weights.

- A reshape that takes channels apart, as ShuffleNet's channel shuffle does, breaks its guess of how many channels
  there are (ZeroDivisionError), and so do splits. They are traced as elementwise operators, and groups that pass
  through them keep their channels, as those do that pass through any operator not known to leave channels alone.
- `F.pad` over channels, the CIFAR ResNets' shortcut, couples channel i with channel i + before.
- A weight that is computed at each call (weight_norm, spectral_norm, parametrizations, pruning's masks), or that
  several modules share, keeps its channels.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from dyconvert.narrowing import torch_pruning_bridge as bridge
from dyconvert.surgery.adapters import unsupported
from dyconvert.torch_internals.modules import ConvNd, tensor_tables
from dyconvert.torch_internals.watching import operator_of, saved_argument

# Backward nodes, without "Backward0", of operators that treat every channel by itself and keep the channels' order.
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


class Obstacles:
    """Knows why channels can't be narrowed, from the nodes that they pass through.

    Args:
        model: the model that is traced.
    """

    def __init__(self, model: nn.Module) -> None:
        self._spatial = max((len(m.kernel_size) for m in model.modules() if isinstance(m, ConvNd)), default=2)
        self._shared = shared_weights(model)

    def mend(self, nodes: list[bridge.Node]) -> None:
        """Correct the traced nodes before torch-pruning couples their channels."""
        for node in nodes:
            kind = bridge.kind(node)
            if kind in ("SPLIT", "UNBIND") or (kind == "RESHAPE" and not self._is_flatten(node.grad_fn)):
                bridge.treat_as_elementwise(node)
        sizes = _Sizes()
        for node in nodes:
            if bridge.kind(node) == "ELEMENTWISE" and bridge.is_operator(node) and len(node.inputs) > 1:
                counts = {id(input_node): sizes.of(input_node) for input_node in node.inputs}
                # A gate with one channel is broadcast to all channels.
                if 1 in counts.values() and any(count is not None and count > 1 for count in counts.values()):
                    for input_node in [s for s in node.inputs if counts[id(s)] == 1]:
                        bridge.part(input_node, node)

    def _is_flatten(self, grad_fn: Any) -> bool:
        return len(_sizes(grad_fn)) in (2, self._spatial + 2)

    def of(self, node: bridge.Node, channels: int) -> str | None:
        """Why the channels that pass through this node can't be narrowed, or None if they can.

        Args:
            channels: the least number of channels there.
        """
        if bridge.kind(node) in ("MHA", "LSTM", "EMBED"):
            return f"they pass through {type(node.module).__name__}"
        if not bridge.is_operator(node):
            return self._of_module(node.module)
        if bridge.is_output(node) or node.grad_fn is None:
            return None
        operator = operator_of(node.grad_fn)
        if operator == "Cat" and not _only_adds_last(node):
            return "they are concatenated with what the forward makes itself"
        if operator in _REDUCTIONS and _over(node, _channels_read(node) or channels):
            return "they are reduced to one (a mean, sum or maximum over channels)"
        if operator in ("Split", "SplitWithSizes", "Unbind"):
            return "they are split into parts (split, chunk)"
        if operator not in _CHANNELWISE:
            return f"they pass through the operator {operator}, which may mix channels"
        if operator in ("View", "UnsafeView", "ReshapeAlias") and not self._is_flatten(node.grad_fn):
            return "they are reshaped, as by a channel shuffle"
        if operator == "Slice" and saved_argument(node.grad_fn, "dim") in (1, None):
            return "they are sliced"
        if operator == "ConstantPadNd" and self.padding(node) and not hasattr(node, "dyconvert_padding"):
            return "they are padded by constant_pad_nd, which no module of its own calls"
        return None

    def _of_module(self, module: Any) -> str | None:
        if not isinstance(module, nn.Module):
            return None
        parameters = list(module.parameters(recurse=False))
        if any(id(p) in self._shared for p in parameters):
            return f"the weight of a {type(module).__name__} is shared with another module"
        return computed_weight(module)

    def padding(self, node: bridge.Node) -> tuple[int, int] | None:
        """The numbers of zero channels that a node adds before and after; None if it adds none."""
        if node.grad_fn is None or operator_of(node.grad_fn) != "ConstantPadNd":
            return None
        pair = tuple(saved_argument(node.grad_fn, "pad") or ())[2 * self._spatial : 2 * self._spatial + 2]
        return pair if any(pair) else None


class _Sizes:
    """Numbers of channels that nodes return; None if unknown."""

    def __init__(self) -> None:
        self._known: dict[int, int | None] = {}

    def of(self, node: bridge.Node) -> int | None:
        # Depth first, without recursion, because graphs are deep.
        stack = [node]
        while stack:
            top = stack[-1]
            if id(top) in self._known:
                stack.pop()
                continue
            missing = [] if _size_of_weights(top) is not None else [s for s in top.inputs if id(s) not in self._known]
            if missing and not any(s in stack for s in missing):
                stack.extend(missing)
                continue
            self._known[id(top)] = self._from_inputs(top)
            stack.pop()
        return self._known[id(node)]

    def _from_inputs(self, node: bridge.Node) -> int | None:
        if (size := _size_of_weights(node)) is not None:
            return size
        counts = [self._known.get(id(input_node)) for input_node in node.inputs]
        if not counts or None in counts or bridge.kind(node) not in (*_KEEP_COUNT, "CONCAT"):
            return None
        if bridge.kind(node) == "CONCAT":
            return sum(counts) if _cat_dim(node.grad_fn) == 1 else None
        reduces = bridge.is_operator(node) and operator_of(node.grad_fn) in _REDUCTIONS and _over(node, max(counts))
        return 1 if reduces else max(counts)


# Nodes that return as many channels as they read.
_KEEP_COUNT = ("ELEMENTWISE", "EXPAND", "OUTPUT", "BN", "LN", "GN", "IN", "PRELU")


def _size_of_weights(node: bridge.Node) -> int | None:
    module = node.module
    if isinstance(module, ConvNd):
        return module.out_channels
    return module.out_features if isinstance(module, nn.Linear) else None


# Backward nodes of operators that may reduce channels to one.
_REDUCTIONS = {"Mean", "Sum", "Amax", "Amin", "LinalgVectorNorm"}


def _channels_read(node: bridge.Node) -> int | None:
    sizes = _Sizes()
    return max((count for input_node in node.inputs if (count := sizes.of(input_node)) is not None), default=None)


def _over(node: bridge.Node, channels: int) -> bool:
    """Whether a reduction is over the channels: dimension 1, or the last one if it has the channels' size."""
    shape, dims = _sizes(node.grad_fn), saved_argument(node.grad_fn, "dim")
    if len(shape) < 2 or dims is None or channels == 1:
        return False
    # Autograd stores negative dimensions as unsigned numbers.
    several = dims if isinstance(dims, tuple | list) else (dims,)
    reduced = {(d - 2**64 if d >= 2**63 else d) % len(shape) for d in several}
    at = 1 if shape[1] == channels or shape[-1] != channels else len(shape) - 1
    return at in reduced


def _cat_dim(grad_fn: Any) -> int:
    dim = saved_argument(grad_fn, "dim")
    return -1 if dim is None else dim - 2**64 if dim >= 2**63 else dim


def _only_adds_last(node: bridge.Node) -> bool:
    """Whether all inputs of a concatenation are in the graph; if convs read it, the last ones may be missing."""
    inside = [function is not None for function, _ in node.grad_fn.next_functions]
    if all(inside):
        return True
    readers = all(isinstance(reader.module, ConvNd) for reader in node.outputs)
    return readers and _cat_dim(node.grad_fn) == 1 and inside == sorted(inside, reverse=True)


def computed_weight(module: nn.Module) -> str | None:
    """Why a module's weight is no parameter, but computed from others at each call; None if it is a parameter."""
    if isinstance(module, ConvNd) and (parametrize.is_parametrized(module) or not _is_plain(module)):
        return f"{type(module).__name__}: {unsupported(module)}"
    if parametrize.is_parametrized(module):
        return f"a {type(module).__name__} is parametrized; parametrize.remove_parametrizations makes it plain"
    if not _is_plain(module):
        return f"the weight of a {type(module).__name__} is computed by a hook (weight_norm, prune); remove that first"
    return None


def _is_plain(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not isinstance(weight, Tensor) or any("weight" in table for table in tensor_tables(module))


def shared_weights(model: nn.Module) -> set[int]:
    """The ids of parameters that several modules have."""
    counts = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    return {key for key, count in counts.items() if count > 1}


def _sizes(grad_fn: Any) -> tuple[int, ...]:
    return tuple(saved_argument(grad_fn, "self_sym_sizes") or saved_argument(grad_fn, "self_sizes") or ())


def follow_padding(graph: bridge.DependencyGraph, obstacles: Obstacles, owner: Callable[..., str | None]) -> None:
    """Couple the channels that a channel-padding shortcut reads with those that it returns.

    Args:
        owner: returns the name of the module that pads, from its grad_fn and the numbers of channels; or None.
    """
    for node in bridge.nodes(graph):
        if (pair := obstacles.padding(node)) is None or (name := owner(node.grad_fn, *pair)) is None:
            continue
        node.dyconvert_padding = name
        for before in node.inputs:
            bridge.shift_channels(node, before, pair[0], bridge.channels_out(graph, before))
