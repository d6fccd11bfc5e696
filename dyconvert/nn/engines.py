"""Which engine computes a dynamic conv without autograd: the one rule, for eager calls and for `torch.compile`'s."""

from typing import Any, Protocol

import torch
from torch import Tensor

from dyconvert.nn import adapted, choice, fitting, native, recompute, tiles
from dyconvert.nn.operands import Geometry, Gradients, Needs, Operands
from dyconvert.nn.trials import key
from dyconvert.nn.triton import engine as triton


class Engine(Protocol):
    """Computes a dynamic conv and its gradients without autograd, and keeps no image's kernel between the two.

    `how` is the engine's own: a :class:`~dyconvert.nn.native.NativeCall`, a :class:`~dyconvert.nn.tiles.Tile` or None,
    one of :data:`dyconvert.nn.recompute.STRATEGIES`, or a :class:`~dyconvert.nn.triton.tile.Tile`.
    """

    def forward(self, operands: Operands, how: Any) -> Tensor:
        """The conv's output, `[N, C_out, *out]`."""
        ...

    def backward(self, grad: Tensor, operands: Operands, needs: Needs, how: Any) -> Gradients:
        """Those gradients that are needed, given the output's; the operands have neither bias nor shift."""
        ...


def by_rule(operands: Operands, *, backward: bool) -> tuple[Engine, Any]:
    """The engine for a conv, and how it is to compute it; padding in numbers.

    On a CPU the compiled kernels where they were built and know the conv, as it is or in another form, else tiles; in
    other dtypes and on other devices plain operations.

    Args:
        backward: whether a backward may follow.

    Raises:
        ArgumentError: the operands don't fit together.
    """
    x, weight = operands.x, operands.weight
    if x.shape[:1] != (0,) and adapted.takes(operands, backward=backward):
        fitting.check(operands)
        return adapted, backward
    if x.is_cpu and x.dtype in _TILED_DTYPES and x.shape[:1] != (0,):
        call = native.prepare(operands)  # which checks them
        if call is not None and _is_matmuls(x, weight, operands.geometry):
            return tiles, None
        if call is not None and (not backward or (call.differentiable and weight.dtype == x.dtype)):
            return native, call
        return tiles, None
    fitting.check(operands)
    return recompute, recompute.by_rule(operands)


def _is_matmuls(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether this is a 1 x 1 conv of several images with channels last: torch's matmuls take that as it lies, and the
    kernels would reorder it."""
    pointwise = weight.dim() == 4 and weight.shape[2:].numel() == 1 and geometry.groups == 1
    return pointwise and x.shape[0] > 1 and tiles.is_channels_last(x) and not any(geometry.padding)


# Engines by the names that they have as strategies; the CPU's stand in the rule alone.
ENGINES: dict[str, tuple[Engine, Any]] = {
    "recompute_groups": (recompute, "groups"),
    "recompute_unfold": (recompute, "unfold"),
    **{name: (triton, tile) for name, tile in triton.TILES.items()},
}


def known_or_by_rule(operands: Operands, *, backward: bool, training: bool) -> tuple[Engine, Any]:
    """The engine that was measured to be the fastest in this process, else the rule's; nothing is measured here.

    Args:
        backward: whether the engine must know the backward.
        training: whether a backward follows, by any engine. Measurements are looked up by it.
    """
    if not operands.x.is_cpu and choice.mode() != "off" and not deterministic():
        known = choice.current().known(key(operands, training=training))
        if known in ENGINES:
            fitting.check(operands)
            return ENGINES[known]
    return by_rule(operands, backward=backward)


def deterministic() -> bool:
    """Whether the user wants the same bits each time: which strategy is the fastest can change from run to run."""
    return torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic


def capturing(x: Tensor) -> bool:
    """Whether what runs on `x` is being recorded into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


# Tiles add up the bank's gradient part by part, for which half precision is too coarse.
_TILED_DTYPES = (torch.float32, torch.float64)
