"""The autograd function around every engine: it keeps no kernel of any image."""

from typing import Any

import torch
from torch import Tensor

from dyconvert.nn import strategies
from dyconvert.nn.engines import Engine
from dyconvert.nn.mixture import Mixing
from dyconvert.nn.strategies import Geometry


class MixedAgainConv(torch.autograd.Function):
    """A dynamic conv that saves its arguments for backward, and mixes the kernels again there.

    Where the backward is itself to be differentiated, it is computed by a plain strategy instead.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        coefficients: Tensor,
        factors: Tensor | None,
        geometry: Geometry,
        engine: Engine,
        how: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, coefficients, factors)
        ctx.asked = geometry, engine, how
        return engine.forward(x, weight, None, Mixing(coefficients, factors), geometry, how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        geometry, engine, how = ctx.asked
        needs = ctx.needs_input_grad[:4]
        x, weight, *mixing = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*_differentiable(grad, ctx.saved_tensors, geometry, needs), None, None, None)
        return (*engine.backward(grad, x, weight, Mixing(*mixing), geometry, needs, how), None, None, None)


def _differentiable(
    grad: Tensor, saved: tuple[Tensor | None, ...], geometry: Geometry, needs: tuple[bool, ...]
) -> list[Tensor | None]:
    x, weight, *mixing = saved
    out = strategies.groups(x, weight, None, Mixing(*mixing), geometry)
    wanted = [tensor for tensor, needed in zip(saved, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in needs]
