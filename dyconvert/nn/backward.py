"""The autograd functions around the compiled kernels and the tiles, which keep no kernel of any image.

They save their arguments for backward, and mix the kernels again there. Where the backward is itself to be
differentiated, it is computed by a plain strategy instead.
"""

from typing import Any

import torch
from torch import Tensor

from dyconvert.nn import native, strategies, tiles
from dyconvert.nn.strategies import Geometry


class NativeConv(torch.autograd.Function):
    """A dynamic conv by the compiled kernels."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, coefficients: Tensor, geometry: Geometry, plan: native.Plan
    ) -> Tensor:
        ctx.save_for_backward(x, weight, coefficients)
        ctx.geometry = geometry
        ctx.plan = plan
        return native.forward(plan, x, weight, None, coefficients)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, coefficients = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            return (*_differentiable(grad, (x, weight, coefficients), ctx.geometry, needs), None, None)
        return (*native.backward(ctx.plan, grad, x, weight, coefficients, needs), None, None)


class TiledConv(torch.autograd.Function):
    """A dynamic conv by tiles."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, coefficients: Tensor, geometry: Geometry, tile: tiles.Tile | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, coefficients)
        ctx.geometry = geometry
        ctx.tile = tile
        return tiles.forward(x, weight, None, coefficients, geometry, tile)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, coefficients = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            return (*_differentiable(grad, (x, weight, coefficients), ctx.geometry, needs), None, None)
        return (*tiles.backward(grad, x, weight, coefficients, ctx.geometry, needs, ctx.tile), None, None)


def _differentiable(
    grad: Tensor, saved: tuple[Tensor, Tensor, Tensor], geometry: Geometry, needs: tuple[bool, ...]
) -> list[Tensor | None]:
    x, weight, coefficients = saved
    out = strategies.groups(x, weight, None, coefficients, geometry)
    wanted = [tensor for tensor, needed in zip(saved, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in needs]
