"""Which engine computes a dynamic conv without autograd: the one rule, for eager calls and for `torch.compile`'s."""

from typing import Any, Protocol

import torch
from torch import Tensor

from dyconvert.nn import native, recompute, tiles
from dyconvert.nn.strategies import Geometry


class Engine(Protocol):
    """What computes a dynamic conv and its gradients without autograd, keeping no image's kernel between the two.

    `how` is the engine's own: a :class:`~dyconvert.nn.native.Call`, a :class:`~dyconvert.nn.tiles.Tile` or None, or
    one of :data:`dyconvert.nn.recompute.STRATEGIES`.
    """

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        coefficients: Tensor,
        geometry: Geometry,
        how: Any,
        shift: Tensor | None = None,
    ) -> Tensor: ...

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        coefficients: Tensor,
        geometry: Geometry,
        needs: tuple[bool, bool, bool],
        how: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...


def by_rule(
    x: Tensor, weight: Tensor, bias: Tensor | None, coefficients: Tensor, geometry: Geometry, *, backward: bool
) -> tuple[Engine, Any]:
    """The engine for a call, and how it is to compute it; padding as numbers.

    On a CPU the compiled kernels where they were built and know the conv, else tiles; in other dtypes and on other
    devices plain operations.

    Args:
        backward: whether a backward may follow.
    """
    if x.is_cpu and x.dtype in _TILED_DTYPES:
        call = native.prepare(x, weight, bias, coefficients, geometry)
        if call is not None and (not backward or (call.differentiable and weight.dtype == x.dtype)):
            return native, call
        return tiles, None
    return recompute, "unfold" if is_matmul(x, weight, geometry) else "groups"


# Tiles add up the bank's gradient part by part, for which half precision is too coarse.
_TILED_DTYPES = (torch.float32, torch.float64)


def is_matmul(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether one batched matmul is the whole conv: 1 x 1, of several images."""
    single = isinstance(x.shape[0], int) and x.shape[0] == 1
    return not single and weight.shape[2:].numel() == 1 and geometry.groups == 1
